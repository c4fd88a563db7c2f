"""Routers: which experts a token goes to, and with what weights.

In: tokens. Out: a `Routing`. Everything is float32 (or better) whatever the model's dtype: small differences of logits
decide between experts. No state is kept; losses and metrics take the `Routing`.

With top_k > 1 a token's weights are the softmax over its chosen logits (they sum to 1). With top_k = 1 that weight
would be the constant 1 and the language loss would not reach the router, so it is the chosen expert's probability among
all (Switch Transformer, arXiv 2101.03961).

Legend: T tokens (batch and time flattened), D width, E experts, K experts per token.
"""

from __future__ import annotations

import abc
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blues import config as cfg
from blues.errors import ConfigError
from blues.kernels.precision import at_least_float32


class Routing(NamedTuple):
    """One layer's decisions. `probs` and `logits` are clean (without noise); `weights` and `ids` are what was done."""

    weights_TK: Tensor
    ids_TK: Tensor
    probs_TE: Tensor
    logits_TE: Tensor


class Router(nn.Module, cfg.Configurable, family="router"):
    """A family. Members implement `forward(x_TD) -> Routing`."""

    @cfg.configclass
    class Config(cfg.Config):
        pass

    def __init__(
        self,
        config: Config,
        *,
        dim: int,
        num_experts: int,
        top_k: int,
        std: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.config = config
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.normal_(self.weight, std=std, generator=generator)

    @abc.abstractmethod
    def forward(self, x_TD: Tensor) -> Routing:
        """Route every token."""


class SoftmaxTopK(Router, variant="softmax_top_k"):
    """The k most probable experts, their probabilities renormalized: Mixtral's rule, and Qwen3-MoE's with
    norm_topk_prob."""

    def forward(self, x_TD: Tensor) -> Routing:
        logits_TE = project(x_TD, self.weight)
        return choose(logits_TE, logits_TE, self.top_k)


class NoisyTopK(Router, variant="noisy_top_k"):
    """Noisy top-k gating (Shazeer et al. 2017, arXiv 1701.06538, eq. 3-5).

    In training the experts are chosen by logits + noise * normal * softplus(x W_noise), so that close experts take
    turns; W_noise is learned. In evaluation there is no noise and this is `softmax_top_k`.
    """

    @cfg.configclass
    class Config(Router.Config):
        noise: float = 1.0

        def __post_init__(self) -> None:
            if self.noise < 0:
                raise ConfigError(f"noise: must not be negative, got {self.noise}")

    def __init__(self, config: Config, *, dim: int, num_experts: int, **runtime: object) -> None:
        super().__init__(config, dim=dim, num_experts=num_experts, **runtime)  # type: ignore[arg-type]
        # Zero, as in the paper: the noise starts at softplus(0) = ln 2 for every expert.
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, dim))

    def forward(self, x_TD: Tensor) -> Routing:
        logits_TE = project(x_TD, self.weight)
        if not self.training:
            return choose(logits_TE, logits_TE, self.top_k)
        scale_TE = self.config.noise * F.softplus(project(x_TD, self.noise_weight))
        return choose(logits_TE, logits_TE + torch.randn_like(logits_TE) * scale_TE, self.top_k)


def project(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x @ weight.T in float32 or better, also under autocast."""
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(at_least_float32(x_TD), at_least_float32(weight_ED))


def choose(logits_TE: Tensor, noisy_TE: Tensor, top_k: int) -> Routing:
    """Choose by the noisy logits and weigh by their softmax; report the clean ones."""
    chosen_TK, ids_TK = noisy_TE.topk(top_k, dim=-1)
    if top_k == 1:
        weights_TK = (chosen_TK - noisy_TE.logsumexp(dim=-1, keepdim=True)).exp()
    else:
        weights_TK = chosen_TK.softmax(dim=-1)
    return Routing(weights_TK, ids_TK, logits_TE.softmax(dim=-1), logits_TE)
