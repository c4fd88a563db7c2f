"""The keys and values of tokens already read, so that decoding a token costs one token.

In: each layer's new `k_BTGC, v_BTGC`, keys before any rotation. Out: all keys and values so far, `k_BSGC, v_BSGC`.

Keys are stored unrotated and rotated on read: a RoPE that changes with the length (dynamic NTK), eviction and
quantization all need that, and rotating one KV head is cheap. Slot j of a row holds that row's token at position j,
so rows of different length need no left padding: a row's shorter prompt is padded on the right, the causal rule
(key position <= query position) hides the padding, and the row's next tokens overwrite it.

Legend: L layers, B rows, T new tokens, S slots, G KV heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blues.model.context import History


class Cache:
    """A preallocated key-value cache that grows by doubling; implements `blues.model.attention.layer.KVCache`.

    `update` may be called once per layer for the same new tokens; `advance` then says how many of them are real.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        rows: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """`capacity`: tokens per row to make room for at once; more are accepted and make the cache grow."""
        shape = (num_layers, rows, max(capacity, 1), num_kv_heads, head_dim)
        self.k_LBSGC = torch.zeros(shape, dtype=dtype, device=device)
        self.v_LBSGC = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * rows
        """Tokens held per row."""
        self.history = History()
        """What routers remember of these tokens."""

    @property
    def length(self) -> int:
        """Tokens held by the longest row."""
        return max(self.lengths, default=0)

    @property
    def even(self) -> bool:
        """Whether all rows hold equally many tokens."""
        return len(set(self.lengths)) <= 1

    @property
    def capacity(self) -> int:
        """Tokens per row that fit before the cache grows."""
        return self.k_LBSGC.shape[2]

    @property
    def num_bytes(self) -> int:
        """Memory taken by the preallocated tensors."""
        return 2 * self.k_LBSGC.numel() * self.k_LBSGC.element_size()

    def positions(self, new: int) -> Tensor:
        """`positions_BT` (int64) that the next `new` tokens of every row take: its length onwards."""
        start_B1 = torch.tensor(self.lengths, device=self.k_LBSGC.device)[:, None]
        return start_B1 + torch.arange(new, device=self.k_LBSGC.device)

    def update(self, layer: int, k_BTGC: Tensor, v_BTGC: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys (unrotated) and values after each row's tokens; return all of that layer.

        Returns `k_BSGC, v_BSGC` with S = `length` + T. In a row shorter than the longest, slots beyond its own
        tokens hold padding, which the causal rule on positions must hide.
        """
        new = k_BTGC.shape[1]
        end = self.length + new
        self.reserve(end)
        if self.even:
            self.k_LBSGC[layer, :, end - new : end] = k_BTGC
            self.v_LBSGC[layer, :, end - new : end] = v_BTGC
        else:
            slots_BT = self.positions(new)
            rows_B1 = torch.arange(len(self.lengths), device=slots_BT.device)[:, None]
            self.k_LBSGC[layer, rows_B1, slots_BT] = k_BTGC.to(self.k_LBSGC.dtype)
            self.v_LBSGC[layer, rows_B1, slots_BT] = v_BTGC.to(self.v_LBSGC.dtype)
        return self.k_LBSGC[layer, :, :end], self.v_LBSGC[layer, :, :end]

    def advance(self, counts: Sequence[int]) -> None:
        """After a forward pass: `counts[b]` of the tokens just stored in row b are real, the rest was padding."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` per row, at least doubling, so that growth costs O(1) per token."""
        if tokens <= self.capacity:
            return
        grown = max(tokens, 2 * self.capacity) - self.capacity
        pad = (0, 0, 0, 0, 0, grown)  # from the last dimension: C, G, then S at its end
        self.k_LBSGC = torch.nn.functional.pad(self.k_LBSGC, pad)
        self.v_LBSGC = torch.nn.functional.pad(self.v_LBSGC, pad)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order: finished rows leave the batch."""
        index = torch.tensor(list(rows), device=self.k_LBSGC.device)
        self.k_LBSGC, self.v_LBSGC = self.k_LBSGC[:, index], self.v_LBSGC[:, index]
        self.lengths = [self.lengths[row] for row in rows]
        self.history.select(list(rows))
