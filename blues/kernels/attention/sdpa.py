"""torch's `scaled_dot_product_attention`, pinned to one of its kernels.

torch chooses among its kernels by itself and takes the quadratic MATH one, in silence, where the others refuse:
`enable_gqa` with a mask, or in float32, is such a case. Every function here names the kernels it may run; where they
refuse, torch raises. Masks go to the kernels that take them, KV heads are shared without a copy where that is possible
and repeated where it is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from blues.kernels.attention.sight import Sight, dense_mask, form_of
from blues.kernels.attention.situation import HALF

FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
BARE = ("full", "causal")
"""Forms without a mask."""


def attention_sdpa(q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, sight: Sight) -> Tensor:
    """The fused kernels of torch, never MATH (FlashAttention-2, arXiv 2307.08691; memory-efficient, arXiv 2112.05682).

    CPU: flash. CUDA: flash or cuDNN in half precision without a mask, else the memory-efficient kernel.
    """
    bare = form_of(sight) in BARE
    if not q_BTHC.is_cuda:
        return _attend(q_BTHC, k_BSGC, v_BSGC, sight, [FLASH], share=False)
    if bare and q_BTHC.dtype in HALF:
        return _attend(q_BTHC, k_BSGC, v_BSGC, sight, [FLASH, CUDNN], share=True)
    return _attend(q_BTHC, k_BSGC, v_BSGC, sight, [EFFICIENT], share=False)


def attention_sdpa_flash(q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, sight: Sight) -> Tensor:
    """FlashAttention-2 (arXiv 2307.08691) as torch bundles it; on CPU torch's own, which takes masks too."""
    return _attend(q_BTHC, k_BSGC, v_BSGC, sight, [FLASH], share=q_BTHC.is_cuda)


def attention_sdpa_cudnn(q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, sight: Sight) -> Tensor:
    """cuDNN's fused attention, which follows FlashAttention-2 (arXiv 2307.08691).

    torch refuses it for a single key. The weight of that key is 1: every query gets its value, and no gradient reaches
    the query and the key.
    """
    if k_BSGC.shape[1] == 1 and form_of(sight) in BARE:
        return v_BSGC.repeat_interleave(q_BTHC.shape[2] // v_BSGC.shape[2], dim=2).expand(-1, q_BTHC.shape[1], -1, -1)
    return _attend(q_BTHC, k_BSGC, v_BSGC, sight, [CUDNN], share=True)


def attention_sdpa_math(q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, sight: Sight) -> Tensor:
    """torch's unfused attention: all scores in memory, any dtype, any device (Vaswani et al., arXiv 1706.03762)."""
    return _attend(q_BTHC, k_BSGC, v_BSGC, sight, [MATH], share=False)


def _attend(
    q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, sight: Sight, kernels: Sequence[SDPBackend], share: bool
) -> Tensor:
    """share: hand over KV heads as they are (`enable_gqa`), instead of repeating them."""
    B, T, H, C = q_BTHC.shape
    _, S, G, _ = k_BSGC.shape
    q_BHTC, k_BGSC, v_BGSC = (x.transpose(1, 2) for x in (q_BTHC, k_BSGC, v_BSGC))
    mask_BHTS = None if sight.is_causal else dense_mask(sight, T, S, q_BTHC.device)
    if mask_BHTS is not None and mask_BHTS.is_floating_point():
        mask_BHTS = mask_BHTS.to(q_BTHC.dtype)
        if mask_BHTS.requires_grad and not (q_BHTC.requires_grad or k_BGSC.requires_grad or v_BGSC.requires_grad):
            q_BHTC = _with_gradient(q_BHTC, mask_BHTS)
    gqa = share and G != H
    if G != H and not share:
        k_BGSC, v_BGSC = (x[:, :, None].expand(B, G, H // G, S, C).reshape(B, H, S, C) for x in (k_BGSC, v_BGSC))
    with sdpa_kernel(list(kernels)):
        out_BHTC = F.scaled_dot_product_attention(
            q_BHTC, k_BGSC, v_BGSC, mask_BHTS, is_causal=sight.is_causal, enable_gqa=gqa
        )
    return out_BHTC.transpose(1, 2)


def _with_gradient(q_BHTC: Tensor, bias_BHTS: Tensor) -> Tensor:
    """The same queries, as something that a gradient reaches.

    The memory-efficient kernel keeps what its backward needs only if queries, keys or values require a gradient, and
    then fails in the backward of a bias that alone does.
    """
    always = torch.ones((), dtype=torch.bool, device=bias_BHTS.device)
    return q_BHTC + bias_BHTS[:1, :1, :1, :1].masked_fill(always, 0.0)
