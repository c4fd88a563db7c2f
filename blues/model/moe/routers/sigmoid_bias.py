"""Sigmoid affinities, balanced by a bias instead of a loss.

In: tokens. Out: a `Routing` to the k experts of highest affinity plus bias.

Legend: T tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.kernels.moe_experts import count_per_expert
from blues.model.context import Context
from blues.model.moe.routing import LinearRouter, Router, Routing, renormalized, shares


class SigmoidBias(LinearRouter, variant="sigmoid_bias"):
    """Sigmoid affinity with auxiliary-loss-free bias (DeepSeek-V3, arXiv 2412.19437, sec. 2.1.2; arXiv 2408.15664).

    The bias takes part in the choice alone: an expert's weight is its affinity, over those of the chosen ones, times
    `scale`. After every update the bias of an expert that got more than the mean load falls by `step`, that of one
    that got less rises by it. No gradient of a loss disturbs the language loss.
    """

    balanced_by = "itself"
    is_softmax = False

    @cfg.configclass
    class Config(Router.Config):
        step: float = 0.001
        scale: float = 1.0

        def __post_init__(self) -> None:
            if self.step < 0:
                raise ConfigError(f"step: must not be negative, got {self.step}")
            if self.scale <= 0:
                raise ConfigError(f"scale: must be positive, got {self.scale}")

    config: Config
    bias_E: Tensor

    def __init__(self, config: Config, *, num_experts: int, **runtime: Any) -> None:
        super().__init__(config, num_experts=num_experts, **runtime)
        self.register_buffer("bias_E", torch.zeros(num_experts))

    def forward(self, x_TD: Tensor, context: Context) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.sigmoid()
        biased_TE = scores_TE.detach() + self.bias_E
        if self.off_E is not None:  # a bias would lift a closed expert again
            biased_TE = biased_TE.masked_fill(self.off_E, -torch.inf)
        ids_TK = self.choose(biased_TE)
        weights_TK = self.config.scale * renormalized(scores_TE.gather(1, ids_TK))
        return Routing(weights_TK, ids_TK, shares(scores_TE), logits_TE)

    def choose(self, biased_TE: Tensor) -> Tensor:
        """`ids_TK` of the best."""
        return biased_TE.topk(self.top_k, dim=-1).indices

    def statistics(self, routing: Routing) -> Tensor:
        """Tokens of each expert."""
        return count_per_expert(routing.ids_TK, self.num_experts).float()

    def adapt(self, sums_S: Tensor) -> None:
        change_E = self.config.step * (sums_S.mean() - sums_S).sign()
        if self.off_E is not None:  # the load is to be even among the open ones; the others wait as they are
            mean = sums_S.sum() / (~self.off_E).sum()
            change_E = (self.config.step * (mean - sums_S).sign()).masked_fill(self.off_E, 0)
        self.bias_E += change_E
