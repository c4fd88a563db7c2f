"""Routers (and rules) that adapt without a gradient: their statistics of an update, added up and handed back.

In: the `Routing` of every forward pass of an update. Out: `Router.adapt`, once a layer after the optimizer's step.

The routing is an output of the forward pass, so activation checkpointing (which runs a forward twice) counts once. All
layers share one reduction over the workers, and there is none if no router keeps state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blues.model.moe.layer import mixtures
from blues.model.moe.routing import Routing


class RouterAdaptation:
    """The mixtures of one model, with the routers and rules in them that adapt."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [moe for _, moe in mixtures(model)]
        self._sums: dict[int, Tensor] = {}

    @torch.no_grad()
    def add(self, routings: Sequence[Routing]) -> None:
        """Count one forward pass: a routing for each mixture layer. Does not wait for the device."""
        for number, (moe, routing) in enumerate(zip(self._layers, routings, strict=True)):
            sums_S = moe.statistics(routing)
            if sums_S is not None:
                known = self._sums.get(number)
                self._sums[number] = sums_S if known is None else known + sums_S

    @torch.no_grad()
    def finish(self) -> None:
        """The update is done: let every router and rule adapt to the sum over its micro batches and all workers."""
        if not self._sums:
            return
        together = torch.cat(list(self._sums.values()))
        dist.all_reduce(together)
        pieces = together.split([len(sums_S) for sums_S in self._sums.values()])
        for number, sums_S in zip(self._sums, pieces, strict=True):
            self._layers[number].adapt(sums_S)
        self._sums.clear()
