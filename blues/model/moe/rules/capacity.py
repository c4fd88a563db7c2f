"""A limit on the tokens of an expert.

In: a `Routing`. Out: the same without the pairs that no longer fit.

Legend: T tokens, K slots per token, N = T*K pairs, E experts.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.kernels.moe_experts import count_per_expert
from blues.model.context import Context
from blues.model.moe.routers.cutoffs import CutoffRouter
from blues.model.moe.routing import Router, Routing
from blues.model.moe.rules.base import Rule


class Capacity(Rule):
    """What both kinds of capacity share: only their order of preference differs. Training alone drops tokens: in
    evaluation a token's fate must not depend on its companions, so there it is dropless."""

    removes = "over_capacity"

    @cfg.configclass
    class Config(Rule.Config):
        """factor: an expert takes at most factor times its share of the T*K pairs of a micro batch, rounded up. The
        share is 1/E, or with null experts that of the balance that their tau aims at (MoE++, arXiv 2410.07348)."""

        factor: float = 1.25

        def __post_init__(self) -> None:
            if self.factor <= 0:
                raise ConfigError(f"factor: must be positive, got {self.factor}")

    config: Config

    def __init__(self, config: Config, *, router: Router, share_E: Sequence[float]) -> None:
        super().__init__(config, router=router, share_E=share_E)
        if isinstance(router, CutoffRouter):
            raise ConfigError(
                f"moe.rules: a capacity has no meaning with moe.router={router.config._variant}, whose experts take "
                "their share of the tokens by construction; remove the rule"
            )
        self.share_E, self.top_k = tuple(share_E), router.top_k

    @abc.abstractmethod
    def preference(self, routing: Routing) -> Tensor:
        """`pairs_N`: pairs t*K + k in the order in which they are served."""

    def forward(self, routing: Routing, context: Context) -> Routing:
        order_N = self.preference(routing)
        place_N = places_in_queue(routing.ids_TK.flatten()[order_N], self.num_experts)
        place_TK = torch.empty_like(place_N).scatter_(0, order_N, place_N).view_as(routing.ids_TK)
        limit_TK = self._limits(routing.ids_TK)
        over_TK = (place_TK >= limit_TK) & (routing.ids_TK < self.num_experts)
        return self.without(routing, over_TK, rescale=False)

    def _limits(self, ids_TK: Tensor) -> Tensor:
        """The capacity of each pair's expert. Few distinct numbers, so no table has to travel to the device."""
        pairs = len(ids_TK) * self.top_k
        limits_E = [max(1, math.ceil(round(self.config.factor * pairs * share, 6))) for share in self.share_E]
        limit_TK = torch.full_like(ids_TK, limits_E[0])
        for expert in range(1, len(limits_E)):
            if limits_E[expert] != limits_E[expert - 1]:
                limit_TK = limit_TK.masked_fill(ids_TK >= expert, limits_E[expert])
        return limit_TK


class CapacityByPosition(Capacity, variant="capacity_by_position"):
    """Experts have a capacity, first come first served (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961).

    All tokens' first choices come before any second choice, earlier tokens of the batch before later ones. Pairs over
    the capacity are dropped: the token keeps its residual and its other experts, whose weights do not change.
    """

    def preference(self, routing: Routing) -> Tensor:
        T, K = routing.ids_TK.shape
        return torch.arange(T * K, device=routing.ids_TK.device).view(T, K).t().flatten()


class CapacityByWeight(Capacity, variant="capacity_by_weight"):
    """Experts have a capacity and serve the heaviest weights first (V-MoE's priority routing, arXiv 2106.05974).

    Otherwise as capacity_by_position. Which tokens are dropped depends on later ones, in training alone.
    """

    def preference(self, routing: Routing) -> Tensor:
        return routing.weights_TK.detach().flatten().sort(descending=True, stable=True).indices


def places_in_queue(ids_N: Tensor, num_experts: int) -> Tensor:
    """`place_N`: how many earlier entries have the same id. Runs on the device without a wait."""
    sorted_N, order_N = ids_N.sort(stable=True)
    counts_E = count_per_expert(ids_N, num_experts + 1)
    starts_E = counts_E.cumsum(0) - counts_E
    places_N = torch.arange(len(ids_N), device=ids_N.device) - starts_E[sorted_N]
    return torch.empty_like(places_N).scatter_(0, order_N, places_N)
