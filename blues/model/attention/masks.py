"""Masks of one forward: block masks that are made once and kept, and positions within documents.

In: a pattern and what a forward knows of its tokens. Out: dense masks and block masks.

Legend: B batch (or 1), H heads (or 1), T queries, S keys.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from blues.model.attention.blocks import build_block_mask
from blues.model.attention.patterns import AttentionPattern, Pairs, TokenTree, pairs_of

logger = logging.getLogger("blues")


class BlockMaskCounts(NamedTuple):
    """What a cache of block masks has done so far, and what it holds."""

    hits: int
    misses: int
    evictions: int
    entries: int
    num_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.hits:,} block masks found, {self.misses:,} made, {self.evictions:,} dropped; holds "
            f"{self.entries:,} ({self.num_bytes / 2**20:.1f} MiB)"
        )


class BlockMasks:
    """Block masks by (pattern, length, device), the least recently used dropped first.

    At most `entries` masks and `num_bytes` of their tensors stay; a mask larger than that is made anew each time.
    """

    def __init__(self, *, entries: int = 64, num_bytes: int = 256 * 2**20) -> None:
        self._entries, self._bytes = entries, num_bytes
        self._masks: OrderedDict[tuple[AttentionPattern, int, torch.device, int], tuple[BlockMask, int]] = OrderedDict()
        self._hits = self._misses = self._evictions = self._held = 0

    def get(self, pattern: AttentionPattern, length: int, device: torch.device, num_heads: int) -> BlockMask:
        """`pattern.block_mask(length, device, num_heads)`, made or found.

        A model that is being compiled finds what forwards before have left and keeps nothing itself: what it makes is
        part of its graph. Neither is counted.
        """
        key = (pattern, length, device, num_heads)
        if torch.compiler.is_compiling():
            held = self._masks.get(key)
            return pattern.block_mask(length, device, num_heads) if held is None else held[0]
        if key in self._masks:
            self._hits += 1
            self._masks.move_to_end(key)
            return self._masks[key][0]
        self._misses += 1
        mask = pattern.block_mask(length, device, num_heads)
        self._masks[key] = (mask, size := block_mask_bytes(mask))
        logger.info(
            "attention: block mask of %s at length %d shows %.1f%% of the blocks and takes %d bytes",
            pattern.config._variant,
            length,
            100 - mask.sparsity(),
            size,
        )
        self._held += size
        while len(self._masks) > self._entries or self._held > self._bytes:
            self._held -= self._masks.popitem(last=False)[1][1]
            self._evictions += 1
        return mask

    def counts(self) -> BlockMaskCounts:
        """Since the cache was made."""
        return BlockMaskCounts(self._hits, self._misses, self._evictions, len(self._masks), self._held)

    def metrics(self) -> dict[str, float]:
        """`attention/block_mask_hits` and `..._misses` so far; empty where no block mask was asked for."""
        if not self._hits + self._misses:
            return {}
        return {
            "attention/block_mask_hits": float(self._hits),
            "attention/block_mask_misses": float(self._misses),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a model start empty: a block mask holds a function, which cannot be pickled."""
        return {"_entries": self._entries, "_bytes": self._bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(entries=state["_entries"], num_bytes=state["_bytes"])  # type: ignore[misc]


def block_mask_bytes(mask: BlockMask) -> int:
    """Memory of a block mask's tensors."""
    parts = mask.as_tuple(flatten=True)
    return sum(part.numel() * part.element_size() for part in parts if isinstance(part, Tensor))


def positions_within_documents(positions_BT: Tensor, documents_BT: Tensor) -> Tensor:
    """Positions counted from the first token of each token's document (which may lie in pieces), `(B, T)`.

    Distances within a document stay what they were. No synchronization with the device.
    """
    positions_BT = positions_BT.expand_as(documents_BT)
    sorted_BT, order_BT = documents_BT.sort(dim=1, stable=True)
    begins_BT = torch.ones_like(sorted_BT, dtype=torch.bool)
    begins_BT[:, 1:] = sorted_BT[:, 1:] != sorted_BT[:, :-1]
    index_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    first_BT = (index_T * begins_BT).cummax(dim=1).values  # of each document's first token, among the sorted
    sorted_positions_BT = positions_BT.gather(1, order_BT)
    within_BT = sorted_positions_BT - sorted_positions_BT.gather(1, first_BT)
    return torch.empty_like(within_BT).scatter_(1, order_BT, within_BT)


def block_mask_of_tokens(
    pattern: AttentionPattern,
    positions_BT: Tensor,
    num_heads: int,
    documents_BT: Tensor | None = None,
    tree: TokenTree | None = None,
) -> BlockMask:
    """The block mask of tokens that are queries and keys alike, for rules that depend on more than the length.

    Made for one forward and not kept: it holds as long as its documents and trees do.
    """
    batch = max(len(x_BT) for x_BT in (positions_BT, documents_BT, tree and tree.tin_BS) if x_BT is not None)
    positions_BT = positions_BT.expand(batch, -1)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        pairs = Pairs(positions_BT[b, q], positions_BT[b, k], h)
        if documents_BT is not None:
            pairs = pairs._replace(query_document=documents_BT[b, q], key_document=documents_BT[b, k])
        if tree is not None:
            pairs = pairs._replace(query_tin=tree.tin_BS[b, q], key_tin=tree.tin_BS[b, k], key_tout=tree.tout_BS[b, k])
        return pattern.element(pairs)

    every = pairs_of(positions_BT, positions_BT, num_heads, documents_BT=documents_BT, tree=tree)

    def allowed(start: int, end: int) -> Tensor:
        return pattern.element(every.of_queries(start, end))

    length = positions_BT.shape[1]
    return build_block_mask(allowed, mask_mod, length, length)
