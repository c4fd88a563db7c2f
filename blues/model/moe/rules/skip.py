"""Experts of little weight are skipped.

In: a `Routing`. Out: the same without the experts that hardly count.

Legend: T tokens, K slots per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.context import Context
from blues.model.moe.routing import Router, Routing
from blues.model.moe.rules.base import Rule

DECAY = 0.99
"""Of the moving average of the median ratio, per update."""


class SkipLight(Rule, variant="skip_light"):
    """Skip an expert whose weight is below beta times the token's largest (NAEE, arXiv 2402.14800).

    With two experts per token this is the paper's rule: the second is dropped if w2 < beta * w1. The weights of the
    others grow so that their sum stays. `beta: null` takes the median of w2 / w1 of this layer, as in the paper; it is
    followed over the training (moving average, a buffer) or measured once by `calibrate`. In evaluation, and with
    `in_training` also in training; there the language loss does not reach the router through tokens left with one
    expert.
    """

    removes = "skipped"

    @cfg.configclass
    class Config(Rule.Config):
        beta: float | None = None
        in_training: bool = False

        def __post_init__(self) -> None:
            if self.beta is not None and not 0 < self.beta <= 1:
                raise ConfigError(f"beta: must be above 0 and at most 1, or null for the median, got {self.beta}")

    config: Config
    ratio: Tensor
    """The median of w2 / w1; 0, which skips nothing, before it is known."""

    def __init__(self, config: Config, *, router: Router, share_E: Sequence[float]) -> None:
        super().__init__(config, router=router, share_E=share_E)
        if router.empty_slots:
            raise ConfigError(
                f"moe.rules: skip_light does not fit moe.router={router.config._variant}, which chooses the number of "
                "experts of a token itself; remove the rule or take a router of fixed moe.top_k"
            )
        self.several = router.top_k > 1  # not where pruning left a single expert
        if config.beta is None and self.several:
            self.num_statistics = 2
            self.register_buffer("ratio", torch.zeros(()))

    @property
    def applies(self) -> bool:
        return self.several and (not self.training or self.config.in_training)

    def forward(self, routing: Routing, context: Context) -> Routing:
        weights_TK = routing.weights_TK.detach()
        beta = self.ratio if self.config.beta is None else self.config.beta
        light_TK = weights_TK < beta * weights_TK.amax(dim=-1, keepdim=True)
        light_TK &= routing.ids_TK < self.num_experts
        return self.without(routing, light_TK, rescale=True)

    def statistics(self, decided: Routing) -> Tensor | None:
        """The median ratio of these tokens, and 1."""
        if not self.num_statistics:
            return None
        median = ratios(decided).median()
        return torch.stack([median, torch.ones_like(median)]).float()

    def adapt(self, sums_S: Tensor) -> None:
        median = sums_S[0] / sums_S[1]
        self.ratio.copy_(torch.where(self.ratio == 0, median, DECAY * self.ratio + (1 - DECAY) * median))


def ratios(routing: Routing) -> Tensor:
    """`ratio_T`: a token's second largest weight over its largest."""
    two_T2 = routing.weights_TK.detach().topk(2, dim=-1).values
    return two_T2[:, 1] / two_T2[:, 0].clamp(min=torch.finfo(two_T2.dtype).tiny)
