"""Block masks of FlexAttention, in memory that is linear in the number of tokens where the rule allows it.

In: a window, or a dense mask. Out: the `BlockMask` that torch's `create_block_mask` would make. That one writes down
every pair of query and key as int64, 8 GiB at 32,768 tokens; which blocks a window touches follows from their ends.

Legend: B batch (or 1), H heads (or 1), T queries, S keys, N blocks of queries, M blocks of keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Queries and keys of a block."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def block_mask_of_window(left: int, right: int, T: int, S: int, device: torch.device) -> BlockMask:
    """Of T queries at the end of S positions that see `left` keys behind them and `right` ahead; -1 is no limit."""

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ahead = key - (query + (S - T))
        near = ahead >= -left if left >= 0 else key >= 0
        return near & (ahead <= right) if right >= 0 else near

    first_N1, last_N1 = (x[:, None] + (S - T) for x in _ends(T, device))
    first_M, last_M = _ends(S, device)
    # Of the pairs of two blocks, key minus query takes every number from `least` to `most`.
    least_NM, most_NM = first_M - last_N1, last_M - first_N1
    some_NM = torch.ones_like(least_NM, dtype=torch.bool)
    whole_NM = (last_N1 - first_N1 == BLOCK - 1) & (last_M - first_M == BLOCK - 1)  # the kernel asks beyond the end
    if left >= 0:
        some_NM, whole_NM = some_NM & (most_NM >= -left), whole_NM & (least_NM >= -left)
    if right >= 0:
        some_NM, whole_NM = some_NM & (least_NM <= right), whole_NM & (most_NM <= right)
    return from_blocks(some_NM[None, None], whole_NM[None, None], sees, T, S)


def block_mask_of_tensor(mask_BHTS: Tensor) -> BlockMask:
    """Of a dense bool mask, which is kept: blocks that are seen in part look it up."""
    B, H, T, S = mask_BHTS.shape

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_BHTS[b if B > 1 else 0, h if H > 1 else 0, query, key]

    padded_BHTS = F.pad(mask_BHTS, (0, -S % BLOCK, 0, -T % BLOCK))
    blocks_BHNQMK = padded_BHTS.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    return from_blocks(blocks_BHNQMK.any(5).any(3), blocks_BHNQMK.all(5).all(3), sees, T, S)


def from_blocks(some_BHNM: Tensor, whole_BHNM: Tensor, mask_mod: MaskMod, T: int, S: int) -> BlockMask:
    """A block mask, given of which pairs of blocks some pair is seen, and of which all are (bool)."""
    partial, full = _listed(some_BHNM & ~whole_BHNM), _listed(whole_BHNM)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(T, S))


def _ends(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first and the last position of each block."""
    first = torch.arange(0, length, BLOCK, device=device)
    return first, (first + (BLOCK - 1)).clamp(max=length - 1)


def _listed(blocks_BHNM: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and their numbers, those first."""
    order_BHNM = blocks_BHNM.int().argsort(dim=-1, descending=True, stable=True)
    return blocks_BHNM.sum(dim=-1).int(), order_BHNM.int().contiguous()
