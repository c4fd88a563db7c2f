"""Noisy top-k.

In: tokens. Out: a `Routing` to the k experts that are best after noise.

Legend: T tokens, D width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.context import Context
from blues.model.moe.routers.noise import ConstantNoise, NoiseSchedule
from blues.model.moe.routing import LinearRouter, Router, Routing, choose, project


class NoisyTopK(LinearRouter, variant="noisy_top_k"):
    """Noisy top-k gating (Shazeer et al. 2017, arXiv 1701.06538, eq. 3-5).

    In training the experts are chosen by logits + noise * normal * softplus(x W_noise), so that close experts take
    turns; W_noise is learned, and `schedule` may take the noise back over the training. In evaluation there is no
    noise and this is `softmax_top_k`.
    """

    @cfg.configclass
    class Config(Router.Config):
        noise: float = 1.0
        schedule: NoiseSchedule.Config = ConstantNoise.Config()

        def __post_init__(self) -> None:
            if self.noise < 0:
                raise ConfigError(f"noise: must not be negative, got {self.noise}")

    config: Config

    def __init__(self, config: Config, *, dim: int, num_experts: int, **runtime: Any) -> None:
        super().__init__(config, dim=dim, num_experts=num_experts, **runtime)
        self.schedule: NoiseSchedule = config.schedule.build()
        # Zero, as in the paper: the noise starts at softplus(0) = ln 2 for every expert.
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, dim))

    def forward(self, x_TD: Tensor, context: Context) -> Routing:
        logits_TE = self.logits(x_TD)
        if not self.training:
            return choose(logits_TE, logits_TE, self.top_k)
        noise = self.schedule.at(context.progress, self.config.noise)
        scale_TE = noise * F.softplus(project(x_TD, self.noise_weight))
        return choose(logits_TE, logits_TE + torch.randn_like(logits_TE) * scale_TE, self.top_k)
