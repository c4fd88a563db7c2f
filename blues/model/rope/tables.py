"""Cosines and sines of all positions, kept from forward to forward.

In: a rotary embedding, a device, a length. Out: the rows of positions 0 .. length - 1 at least.

A row depends on its position and the frequencies alone, so a table that grew equals one made anew, bit for bit.

Legend: B batch (or 1), T positions, S rows, P pairs.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """The rotation of each channel pair at each position, in float32."""

    cos_BTP: Tensor
    sin_BTP: Tensor


class Turning(Protocol):
    """The part of a rotary embedding that a table is made of."""

    def length_key(self, length: int) -> int: ...

    def compute(self, positions_BT: Tensor, length: int | None = None) -> Rotation: ...


class Tables:
    """The tables of one rotary embedding by (device, what the length changes), the least recently used dropped first.

    `entries` are kept: two devices of an embedding that knows a short and a long length. One that changes with every
    length (dynamic NTK beyond its original length) makes one for each, and they do not pile up.
    """

    def __init__(self, *, entries: int = 4) -> None:
        self._entries = entries
        self._tables: OrderedDict[tuple[torch.device, int], tuple[Tensor, Tensor]] = OrderedDict()

    def get(self, rope: Turning, device: torch.device, length: int) -> tuple[Tensor, Tensor]:
        """`cos_SP, sin_SP` of a text of `length` tokens, S >= length; made, or at least doubled, where too short."""
        key = (device, rope.length_key(length))
        table = self._tables.pop(key, None)
        rows = 0 if table is None else len(table[0])
        if table is None or rows < length:
            with torch.inference_mode(False), torch.no_grad():  # training may use what generation has made
                positions_1S = torch.arange(max(length, 2 * rows), device=device)[None]
                cos_1SP, sin_1SP = rope.compute(positions_1S, length)
            table = cos_1SP[0], sin_1SP[0]
        self._tables[key] = table  # the latest in use comes last
        while len(self._tables) > self._entries:
            self._tables.popitem(last=False)
        return table

    @property
    def num_bytes(self) -> int:
        """Memory of all tables."""
        return sum(x.numel() * x.element_size() for table in self._tables.values() for x in table)

    def __len__(self) -> int:
        return len(self._tables)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles start empty."""
        return _empty, (self._entries,)


def _empty(entries: int) -> Tables:
    return Tables(entries=entries)
