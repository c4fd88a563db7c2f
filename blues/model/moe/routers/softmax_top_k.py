"""Softmax top-k.

In: tokens. Out: a `Routing` to the k most probable experts.

Legend: T tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.context import Context
from blues.model.moe.routers.noise import ConstantNoise, NoiseSchedule
from blues.model.moe.routing import LinearRouter, Router, Routing, choose


class SoftmaxTopK(LinearRouter, variant="softmax_top_k"):
    """The k most probable experts, their probabilities renormalized (Mixtral, arXiv 2401.04088).

    Also Qwen3-MoE's rule with norm_topk_prob. `renormalize=false`: the probabilities themselves are the weights (OLMoE,
    arXiv 2409.02060). `jitter`: in training the router, and it alone, sees its input multiplied by a number from
    [1 - jitter, 1 + jitter], drawn for every entry (Switch Transformer, arXiv 2101.03961), by `schedule`.
    """

    @cfg.configclass
    class Config(Router.Config):
        renormalize: bool = True
        jitter: float = 0.0
        schedule: NoiseSchedule.Config = ConstantNoise.Config()

        def __post_init__(self) -> None:
            if not 0 <= self.jitter < 1:
                raise ConfigError(f"jitter: must be from 0 to below 1, got {self.jitter}")

    config: Config

    def __init__(self, config: Config, **runtime: Any) -> None:
        super().__init__(config, **runtime)
        self.schedule: NoiseSchedule = config.schedule.build()

    def forward(self, x_TD: Tensor, context: Context) -> Routing:
        logits_TE = seen_TE = self.logits(x_TD)
        jitter = self.schedule.at(context.progress, self.config.jitter) if self.training else 0.0
        if jitter:
            factor_TD = 1 + jitter * (2 * torch.rand_like(x_TD, dtype=logits_TE.dtype) - 1)
            seen_TE = self.logits(x_TD * factor_TD)
        routing = choose(logits_TE, seen_TE, self.top_k)
        if self.config.renormalize or self.top_k == 1:
            return routing
        return routing._replace(weights_TK=seen_TE.softmax(dim=-1).gather(1, routing.ids_TK))
