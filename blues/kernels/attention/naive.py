"""Attention as it is defined, with every score in memory: the reference for every other implementation."""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor

from blues.kernels.attention.sight import Sight, dense_mask
from blues.kernels.precision import at_least_float32


def attention_naive(q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, sight: Sight) -> Tensor:
    """The definition, written out; softmax in float32 or better (Vaswani et al., arXiv 1706.03762)."""
    _, T, H, C = q_BTHC.shape
    _, S, G, _ = k_BSGC.shape
    k_BSHC = repeat(k_BSGC, "b s g c -> b s (g share) c", share=H // G)
    v_BSHC = repeat(v_BSGC, "b s g c -> b s (g share) c", share=H // G)
    scores_BHTS = at_least_float32(torch.einsum("bthc,bshc->bhts", q_BTHC, k_BSHC)) * C**-0.5
    mask_BHTS = dense_mask(sight, T, S, q_BTHC.device)
    if mask_BHTS is not None and mask_BHTS.is_floating_point():
        bias_BHTS, mask_BHTS = mask_BHTS, mask_BHTS > -torch.inf
        scores_BHTS = scores_BHTS + torch.where(mask_BHTS, bias_BHTS, 0.0).to(scores_BHTS.dtype)
    if mask_BHTS is not None:
        # The lowest finite number, not -inf: the softmax of a query that sees nothing is then finite, and its
        # gradient too, before the second line makes both zero. For all others exp() of it is exactly zero.
        scores_BHTS = scores_BHTS.masked_fill(~mask_BHTS, torch.finfo(scores_BHTS.dtype).min)
    probs_BHTS = scores_BHTS.softmax(dim=-1)
    if mask_BHTS is not None:
        probs_BHTS = probs_BHTS.masked_fill(~mask_BHTS, 0.0)
    return torch.einsum("bhts,bshc->bthc", probs_BHTS.to(v_BSHC.dtype), v_BSHC)
