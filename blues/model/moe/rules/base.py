"""The family of rules that take pairs of token and expert away after the router has decided.

In: a `Routing`. Out: a `Routing` in which some slots are empty. Rules are values in a list (`moe.rules`), applied in
order: any that fit can be combined. Balancing and adaptation go by what the router decided, not by what was left.

Legend: T tokens, K slots per token, E experts (those without matrices included), S statistics.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from blues import config as cfg
from blues.model.context import Context
from blues.model.moe.routing import FixedBuffers, Router, Routing

Removed = Literal["skipped", "over_capacity", "dropped_out"]


class Rule(FixedBuffers, cfg.Configurable, family="routing_rule"):
    """A family. Members implement `forward(routing, context) -> Routing` and say when they apply."""

    @cfg.configclass
    class Config(cfg.Config):
        pass

    removes: ClassVar[Removed]
    """The name under which the pairs taken away are counted."""
    num_statistics: int = 0
    """Length of what `statistics` returns; 0: nothing."""

    def __init__(self, config: Config, *, router: Router, share_E: Sequence[float]) -> None:
        """
        Args:
            router: whose routings it changes.
            share_E: of the pairs that each expert has when the load is balanced; sums to 1.

        Raises:
            ConfigError: the rule makes no sense with this router.
        """
        super().__init__()
        self.config = config
        self.num_experts = router.num_experts

    @property
    def applies(self) -> bool:
        """Whether the rule acts now, in training or in evaluation (`self.training`)."""
        return self.training

    @abc.abstractmethod
    def forward(self, routing: Routing, context: Context) -> Routing:
        """The routing with fewer pairs; called only where the rule applies."""

    def statistics(self, decided: Routing) -> Tensor | None:
        """As `Router.statistics`, of the router's own decision."""
        return None

    def adapt(self, sums_S: Tensor) -> None:
        """As `Router.adapt`."""

    def without(self, routing: Routing, removed_TK: Tensor, *, rescale: bool) -> Routing:
        """Empty the slots that are True in `removed_TK`.

        `rescale`: a token's other weights grow so that their sum stays. A token that loses all gets nothing.
        """
        weights_TK = routing.weights_TK.masked_fill(removed_TK, 0)
        if rescale:
            total_T1 = weights_TK.sum(dim=-1, keepdim=True)
            factor_T1 = routing.weights_TK.sum(dim=-1, keepdim=True) / torch.where(total_T1 > 0, total_T1, 1)
            # Untouched tokens keep their weights to the last bit.
            weights_TK = torch.where(removed_TK.any(dim=-1, keepdim=True), weights_TK * factor_T1, weights_TK)
        return routing._replace(weights_TK=weights_TK, ids_TK=routing.ids_TK.masked_fill(removed_TK, self.num_experts))
