"""Dropout of experts, so that no token relies on one of them alone.

In: a `Routing` in training. Out: the same with experts, or single pairs, left out at random.

Legend: T tokens, K slots per token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.context import Context
from blues.model.moe.routers.noise import ConstantNoise, NoiseSchedule
from blues.model.moe.routing import Router, Routing
from blues.model.moe.rules.base import Rule


class Dropout(Rule):
    """What both kinds of dropout share: the rate and its schedule over the training."""

    removes = "dropped_out"

    @cfg.configclass
    class Config(Rule.Config):
        rate: float = 0.1
        schedule: NoiseSchedule.Config = ConstantNoise.Config()

        def __post_init__(self) -> None:
            if not 0 <= self.rate < 1:
                raise ConfigError(f"rate: must be from 0 to below 1, got {self.rate}")

    config: Config

    def __init__(self, config: Config, *, router: Router, share_E: Sequence[float]) -> None:
        super().__init__(config, router=router, share_E=share_E)
        self.schedule: NoiseSchedule = config.schedule.build()

    def rate(self, context: Context) -> float:
        """The rate now."""
        return self.schedule.at(context.progress, self.config.rate)


class ExpertDropout(Dropout, variant="expert_dropout"):
    """Whole experts are left out of a micro batch at random, never all (cf. Gating Dropout, arXiv 2205.14336).

    Every expert of the layer is out with probability `rate`, drawn for each micro batch and worker; if all were, the
    one drawn last stays. A token's other weights grow so that their sum stays; a token that loses all its experts
    keeps its residual alone. The load is balanced by what the router wanted.
    """

    def forward(self, routing: Routing, context: Context) -> Routing:
        drawn_E = torch.rand(self.num_experts, device=routing.ids_TK.device)
        out_E = (drawn_E < self.rate(context)) & (drawn_E < drawn_E.max())
        out_E = torch.cat([out_E, out_E.new_zeros(1)])  # an empty slot stays as it is
        return self.without(routing, out_E[routing.ids_TK], rescale=True)


class PairDropout(Dropout, variant="pair_dropout"):
    """Single pairs of token and expert are left out at random, never all of a token (dropout, arXiv 1207.0580).

    Every pair is out with probability `rate`; if all of a token's were, the one drawn last stays. The token's other
    weights grow so that their sum stays.
    """

    def forward(self, routing: Routing, context: Context) -> Routing:
        drawn_TK = torch.rand(routing.ids_TK.shape, device=routing.ids_TK.device)
        drawn_TK = drawn_TK.masked_fill(routing.ids_TK >= self.num_experts, -1)  # the one that stays is an expert
        out_TK = (drawn_TK < self.rate(context)) & (drawn_TK < drawn_TK.amax(dim=-1, keepdim=True))
        return self.without(routing, out_TK & (drawn_TK >= 0), rescale=True)
