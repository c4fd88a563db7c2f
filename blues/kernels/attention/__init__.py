"""Scaled dot-product attention with fewer key-value heads than query heads.

In: queries, keys and values, already normalized and rotated, and which keys a query may see. Out: the mixed values.

Every implementation has the signature `(q_BTHC, k_BSGC, v_BSGC, sight) -> out_BTHC`, see `Sight`. Query head h reads KV
head h // (H/G), as in GQA (arXiv 2305.13245); G = 1 is multi-query attention (arXiv 1911.02150). Scores are scaled by
C ** -0.5. `choose` says which one runs, `supports` why another one cannot.

Legend: B batch, T queries, S keys, H query heads, G KV heads, C channels of a head.
"""

from blues.kernels.attention.choice import AUTO, BACKENDS, Backend, choose, supports
from blues.kernels.attention.naive import attention_naive
from blues.kernels.attention.sight import AttentionFunction, Form, Sight, dense_mask, form_of
from blues.kernels.attention.situation import Situation, capability_of

__all__ = [
    "AUTO",
    "BACKENDS",
    "AttentionFunction",
    "Backend",
    "Form",
    "Sight",
    "Situation",
    "attention_naive",
    "capability_of",
    "choose",
    "dense_mask",
    "form_of",
    "supports",
]
