"""Block masks of FlexAttention, made a few blocks of queries at a time.

In: a rule. Out: the `BlockMask` that torch's `create_block_mask` would make, without ever holding T x S entries for
every head: at 32,768 tokens and 12 heads those would be 12 GiB, and the distances that they are made from 8 more.

Legend: B batch (or 1), H heads (or 1), T queries, S keys, N blocks of queries, M blocks of keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from blues.kernels.attention.blocks import BLOCK, MaskMod, from_blocks

ENTRIES = 2**25
"""Entries of a mask that are looked at together."""


def build_block_mask(
    allowed: Callable[[int, int], Tensor], mask_mod: MaskMod, queries: int, keys: int, *, entries: int = ENTRIES
) -> BlockMask:
    """The block mask of a rule.

    Args:
        allowed: `allowed(start, end)` is the rule for queries start..end-1 and all keys, bool (B, H, end - start, S).
        mask_mod: the same rule, entry by entry, for blocks that are seen in part.
        entries: bounds what `allowed` is asked for at once, down to one block of queries.
    """
    first_BHTM = _blocks_of_keys(allowed(0, 1), keys, any_of=True)
    rows = max(1, entries // (first_BHTM.shape[0] * first_BHTM.shape[1] * keys * BLOCK)) * BLOCK
    some, whole = [], []
    for start in range(0, queries, rows):
        mask_BHTS = allowed(start, min(start + rows, queries))
        ragged = -mask_BHTS.shape[2] % BLOCK
        some.append(_blocks_of_queries(F.pad(_blocks_of_keys(mask_BHTS, keys, any_of=True), (0, 0, 0, ragged)), True))
        whole.append(
            _blocks_of_queries(F.pad(_blocks_of_keys(mask_BHTS, keys, any_of=False), (0, 0, 0, ragged)), False)
        )
    return from_blocks(torch.cat(some, dim=2), torch.cat(whole, dim=2), mask_mod, queries, keys)


def _blocks_of_keys(mask_BHTS: Tensor, keys: int, *, any_of: bool) -> Tensor:
    """bool (B, H, T, M): whether a query sees any, or all, of a block's keys; what is beyond the last key is unseen."""
    blocks_BHTMK = F.pad(mask_BHTS, (0, -keys % BLOCK)).unflatten(-1, (-1, BLOCK))
    return blocks_BHTMK.any(dim=-1) if any_of else blocks_BHTMK.all(dim=-1)


def _blocks_of_queries(blocks_BHTM: Tensor, any_of: bool) -> Tensor:
    blocks_BHNQM = blocks_BHTM.unflatten(2, (-1, BLOCK))
    return blocks_BHNQM.any(dim=3) if any_of else blocks_BHNQM.all(dim=3)
