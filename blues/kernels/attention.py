"""Scaled dot-product attention with fewer key-value heads than query heads.

In: queries, keys and values, already normalized and rotated, and which keys a query may see. Out: the mixed values.

Every implementation has the signature
`(q_BTHC, k_BSGC, v_BSGC, mask_BTS, is_causal) -> out_BTHC`. Query head h reads KV head h // (H/G), as in GQA
(arXiv 2305.13245); G = 1 is multi-query attention (arXiv 1911.02150). Scores are scaled by C ** -0.5.

- `is_causal=True` needs S == T and no mask: query t sees the keys 0..t.
- `mask_BTS` (bool; its first dimension may be 1): True where a query may see a key. Every query must see a key.
- neither: every query sees every key.

Legend: B batch, T queries, S keys, H query heads, G KV heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from blues.errors import ConfigError
from blues.kernels.precision import at_least_float32

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]

HALF = (torch.bfloat16, torch.float16)


def attention_naive(q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, mask_BTS: Tensor | None, is_causal: bool) -> Tensor:
    """The definition, written out; softmax in float32 or better. The reference for every other implementation."""
    _, T, H, C = q_BTHC.shape
    _, S, G, _ = k_BSGC.shape
    k_BSHC = repeat(k_BSGC, "b s g c -> b s (g share) c", share=H // G)
    v_BSHC = repeat(v_BSGC, "b s g c -> b s (g share) c", share=H // G)
    scores_BHTS = at_least_float32(torch.einsum("bthc,bshc->bhts", q_BTHC, k_BSHC)) * C**-0.5
    if is_causal:
        mask_BTS = torch.ones(1, T, S, dtype=torch.bool, device=q_BTHC.device).tril()
    if mask_BTS is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask_BTS[:, None], -torch.inf)
    probs_BHTS = scores_BHTS.softmax(dim=-1).to(v_BSHC.dtype)
    return torch.einsum("bhts,bshc->bthc", probs_BHTS, v_BSHC)


def attention_sdpa(q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, mask_BTS: Tensor | None, is_causal: bool) -> Tensor:
    """torch's `scaled_dot_product_attention`: flash attention on CPU and, in half precision, on CUDA.

    KV heads are shared without a copy. On CUDA in half precision without a mask this is pinned to the flash and cuDNN
    kernels and raises where neither runs, because `enable_gqa` otherwise falls back to the quadratic one in silence.
    Elsewhere KV heads are broadcast by a stride of zero, which every kernel takes.
    """
    B, T, H, C = q_BTHC.shape
    _, S, G, _ = k_BSGC.shape
    q_BHTC, k_BGSC, v_BGSC = (x.transpose(1, 2) for x in (q_BTHC, k_BSGC, v_BSGC))
    if mask_BTS is None and q_BTHC.is_cuda and q_BTHC.dtype in HALF:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
            out_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BGSC, v_BGSC, is_causal=is_causal, enable_gqa=G != H)
        return out_BHTC.transpose(1, 2)
    if G != H:
        k_BGSC, v_BGSC = (x[:, :, None].expand(B, G, H // G, S, C).reshape(B, H, S, C) for x in (k_BGSC, v_BGSC))
    mask_B1TS = None if mask_BTS is None else mask_BTS[:, None]
    return F.scaled_dot_product_attention(q_BHTC, k_BGSC, v_BGSC, mask_B1TS, is_causal=is_causal).transpose(1, 2)


ATTENTION: dict[str, AttentionFunction] = {"naive": attention_naive, "sdpa": attention_sdpa}
"""Implementations by the name of `Attention.Config.backend`."""


def assert_supported(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raise ConfigError where `backend` cannot run without falling back to a slower kernel."""
    if backend == "sdpa" and device.type == "cuda" and dtype in HALF and (head_dim % 8 or head_dim > 256):
        raise ConfigError(
            f"attention.head_dim: flash attention on CUDA needs a multiple of 8 up to 256, got {head_dim}; "
            "change it or set attention.backend=naive"
        )
