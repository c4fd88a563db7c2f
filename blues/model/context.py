"""What all layers of one forward share, apart from the residual stream and who attends to whom.

In: the arguments of `Transformer.forward`. Out: a `Context`, handed unchanged to every block and from there to routers.

Legend: B batch, T tokens of this forward, S slots of a cache, E any width.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Context(NamedTuple):
    """One forward's tokens and where they come from."""

    tokens_BT: Tensor
    documents_BT: Tensor | None = None
    """Numbers: tokens of a row with the same one are of the same document. None: every row is one document."""
    languages_BT: Tensor | None = None
    """int64 number of each token's language, 0 = unknown. None: all unknown."""
    progress: float = 1.0
    """Share of the training that is done, 0 to 1; schedules go by it. Evaluation and generation: 1."""
    past: Past | None = None
    """Where these tokens lie in the cache; None without one."""
    left_BT: Tensor | None = None
    """bool: tokens that have left at an earlier layer (`depth=early_exit`), which the next blocks pass by; None: none
    has."""


class Past(NamedTuple):
    """The place of a forward's tokens in a cache."""

    slots_BT: Tensor
    """int64; consecutive in every row."""
    history: History | None
    """What routers remember of the tokens before; None if the cache keeps none."""


class History:
    """Per-token vectors that routers keep beside the keys and values of a cache, slot by slot as those: slot j of a row
    holds that row's token at position j, so padding is overwritten by the tokens that take its place."""

    def __init__(self) -> None:
        self._rows_BSE: dict[nn.Module, Tensor] = {}

    def running_sum(self, owner: nn.Module, x_BTE: Tensor, slots_BT: Tensor) -> Tensor:
        """`sum_BTE`: of the vectors at slots 0..slot of each new token, which this call adds.

        Args:
            owner: the router that they belong to.
            slots_BT: consecutive in every row; those before a row's first are known from earlier calls.
        """
        first_B = slots_BT[:, 0]
        end = int(slots_BT.max()) + 1
        rows_BSE = self._rows_BSE.get(owner)
        if rows_BSE is None:
            rows_BSE = x_BTE.new_zeros(len(x_BTE), end, x_BTE.shape[-1])
        if rows_BSE.shape[1] < end:
            more = max(end, 2 * rows_BSE.shape[1]) - rows_BSE.shape[1]
            rows_BSE = torch.cat([rows_BSE, rows_BSE.new_zeros(len(rows_BSE), more, rows_BSE.shape[2])], dim=1)
        index = torch.arange(len(x_BTE), device=x_BTE.device)
        before_BE = rows_BSE[index, (first_B - 1).clamp(min=0)] * (first_B > 0)[:, None]
        sum_BTE = before_BE[:, None] + x_BTE.cumsum(dim=1)
        rows_BSE[index[:, None], slots_BT] = sum_BTE.detach()
        self._rows_BSE[owner] = rows_BSE
        return sum_BTE

    def keep(self, owner: nn.Module, x_BTE: Tensor, slots_BT: Tensor) -> Tensor:
        """`x_BSE`: the vectors of all slots so far, those of the new tokens, which this call adds, included."""
        end = int(slots_BT.max()) + 1
        rows_BSE = self._rows_BSE.get(owner)
        if rows_BSE is None:
            rows_BSE = x_BTE.new_zeros(len(x_BTE), end, x_BTE.shape[-1])
        if rows_BSE.shape[1] < end:
            more = max(end, 2 * rows_BSE.shape[1]) - rows_BSE.shape[1]
            rows_BSE = torch.cat([rows_BSE, rows_BSE.new_zeros(len(rows_BSE), more, rows_BSE.shape[2])], dim=1)
        rows_BSE[torch.arange(len(x_BTE), device=x_BTE.device)[:, None], slots_BT] = x_BTE.detach()
        self._rows_BSE[owner] = rows_BSE
        return rows_BSE[:, :end]

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        for owner, rows_BSE in self._rows_BSE.items():
            self._rows_BSE[owner] = rows_BSE[torch.tensor(rows, device=rows_BSE.device)]


@runtime_checkable
class KeepsHistory(Protocol):
    """A cache that also keeps what routers remember."""

    @property
    def history(self) -> History: ...
