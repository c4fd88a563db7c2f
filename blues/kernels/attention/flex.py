"""FlexAttention (arXiv 2412.05496): one fused kernel for any mask, which skips the blocks that a `BlockMask` lacks.

On CUDA it is compiled by itself; inside a model that is compiled it becomes part of that. On CPU torch runs it unfused
and without a gradient, so `supports` refuses training there.

With fewer than 128 queries torch has a kernel for decoding that splits the keys, but

- only where the query heads of a KV head are a power of two; for 12 it takes the main kernel in silence. Without a
  gradient such groups are padded here with heads of zeros, and the result is cut.
- it keeps the queries of all those heads together in one tile. Where the tile is more than a block of the mask, torch
  finds no kernel at all (`NoValidChoicesError`); here the main kernel is then named.

Legend: B batch, T queries, S keys, H query heads, G KV heads, C channels of a head.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions, flex_attention

from blues.kernels.attention.blocks import block_mask_of_tensor, block_mask_of_window
from blues.kernels.attention.sight import Sight, window_of

DECODING = 128
"""torch has its decoding kernel for fewer queries than this, and here for as many rows of a tile."""
MAIN_KERNEL: FlexKernelOptions = {"BACKEND": "TRITON"}
RECOMPILATIONS = 256
"""Distinct masks and shapes for which kernels are compiled, before torch raises. Its own limit is 8, which a model
with a pattern of its own in every layer exceeds."""


def attention_flex(q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, sight: Sight) -> Tensor:
    """FlexAttention, compiled for the mask of a pattern (arXiv 2412.05496).

    See the module's docstring. A `sight` without a block mask gets one, made once for each window and length.
    """
    _, T, H, _ = q_BTHC.shape
    _, S, G, _ = k_BSGC.shape
    block_mask = block_mask_of(sight, T, S, q_BTHC.device)
    group = H // G
    padded = decoding_group(group)
    decodes = fits_decoding(T, padded, block_mask)
    if not decodes or _needs_gradient(q_BTHC, k_BSGC, v_BSGC):
        padded = group
    if padded != group:
        q_BTGRC = rearrange(q_BTHC, "b t (g r) c -> b t g r c", g=G)
        q_BTHC = F.pad(q_BTGRC, (0, 0, 0, padded - group)).flatten(2, 3)
    q_BHTC, k_BGSC, v_BGSC = (x.transpose(1, 2) for x in (q_BTHC, k_BSGC, v_BSGC))
    options = None if decodes or T >= DECODING else MAIN_KERNEL
    out_BHTC = _flex(q_BHTC, k_BGSC, v_BGSC, block_mask, padded != 1, options)
    if padded != group:
        out_BHTC = rearrange(out_BHTC, "b (g r) t c -> b g r t c", g=G)[:, :, :group].flatten(1, 2)
    return out_BHTC.transpose(1, 2)


def decoding_group(group: int) -> int:
    """Query heads of a KV head that the decoding kernel takes: the next power of two."""
    return 1 << (group - 1).bit_length()


def fits_decoding(T: int, group: int, block_mask: BlockMask | None) -> bool:
    """Whether the decoding kernel takes T queries of `group` heads (a power of two) each.

    Its tile has the next power of two of T * group rows, which must divide the mask's blocks of queries; without a
    mask torch sets no bound, and a tile of thousands of rows is compiled until memory ends.
    """
    rows = 1 << max(T * group - 1, 15).bit_length()
    if block_mask is None:
        return rows <= DECODING
    tells_heads_apart = group != 1 and block_mask.shape[1] != 1
    return rows <= DECODING and block_mask.BLOCK_SIZE[0] % rows == 0 and not tells_heads_apart


def block_mask_of(sight: Sight, T: int, S: int, device: torch.device) -> BlockMask | None:
    """The block mask of `sight`; None where every query sees every key."""
    if sight.block_mask is not None:
        return sight.block_mask
    if sight.mask_BTS is not None and sight.window is None and not sight.is_causal:
        mask_BTS = sight.mask_BTS
        return block_mask_of_tensor(mask_BTS if mask_BTS.ndim == 4 else mask_BTS[:, None])
    left, right = window_of(sight)
    return None if left < 0 and right < 0 else _kept_block_mask(left, right, T, S, device)


_kept_block_mask = functools.lru_cache(maxsize=64)(block_mask_of_window)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """fullgraph: what torch cannot compile raises, instead of running unfused."""
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _flex(
    q_BHTC: Tensor,
    k_BGSC: Tensor,
    v_BGSC: Tensor,
    block_mask: BlockMask | None,
    gqa: bool,
    options: FlexKernelOptions | None,
) -> Tensor:
    if torch.compiler.is_compiling():
        return flex_attention(q_BHTC, k_BGSC, v_BGSC, block_mask=block_mask, enable_gqa=gqa, kernel_options=options)
    if q_BHTC.is_cuda:
        compiled = _compiled()
        with torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS):
            return compiled(q_BHTC, k_BGSC, v_BGSC, block_mask=block_mask, enable_gqa=gqa, kernel_options=options)
    if not torch.is_grad_enabled():  # torch refuses what requires a gradient even where none is recorded
        q_BHTC, k_BGSC, v_BGSC = q_BHTC.detach(), k_BGSC.detach(), v_BGSC.detach()
    with warnings.catch_warnings():  # torch warns that this is unfused; for CPU that is what the module says
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(q_BHTC, k_BGSC, v_BGSC, block_mask=block_mask, enable_gqa=gqa, kernel_options=options)
