"""ReLU routing.

In: tokens. Out: a `Routing` of each token to the experts with a positive gate, of varying number.

Legend: T tokens, D width, E experts (also the number of slots).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.context import Context
from blues.model.moe.routing import LinearRouter, Router, Routing, shares, slots


class ReLURouter(LinearRouter, variant="relu"):
    """ReLU gates under an adaptive, load-balanced L1 penalty (ReMoE, arXiv 2412.14711): differentiable throughout.

    A token goes to every expert whose gate relu(logit) is positive, with the gate as weight. The penalty is
    strength * sum_e f_e * (mean gate of e), where f_e is e's load over the mean load that k experts a token would give
    so that busy experts are pushed back most. After every update the strength grows by the factor `growth` if more than
    k of E gates are open, and shrinks by it if fewer. Here each layer has a strength of its own (the paper: one for
    all), and it never falls below the first one, or it would take hundreds of updates to come back. Training starts
    with about half of all gates open; then all open, and the penalty closes them. At high learning rates a layer may
    close nearly all for some hundred updates before it settles at k.
    """

    balanced_by = "itself"
    is_softmax = False
    empty_slots = True

    @cfg.configclass
    class Config(Router.Config):
        first_strength: float = 1e-8
        growth: float = 1.2

        def __post_init__(self) -> None:
            if self.first_strength <= 0:
                raise ConfigError(f"first_strength: must be positive, got {self.first_strength}")
            if self.growth < 1:
                raise ConfigError(f"growth: must be at least 1, got {self.growth}")

    config: Config
    strength: Tensor

    def __init__(self, config: Config, **runtime: Any) -> None:
        super().__init__(config, **runtime)
        self.register_buffer("strength", torch.tensor(config.first_strength, dtype=torch.float32))

    def forward(self, x_TD: Tensor, context: Context) -> Routing:
        logits_TE = self.logits(x_TD)
        gates_TE = logits_TE.relu()
        open_TE = gates_TE > 0
        load_E = open_TE.to(gates_TE.dtype).mean(dim=0) * (self.num_experts / self.top_k)
        penalty = self.strength * (load_E * gates_TE.mean(dim=0)).sum()
        return Routing(*slots(open_TE, gates_TE), shares(gates_TE), logits_TE, penalty)

    def statistics(self, routing: Routing) -> Tensor:
        """Open gates, and all gates."""
        open_gates = (routing.ids_TK < self.num_experts).sum()
        return torch.stack([open_gates, torch.full_like(open_gates, routing.ids_TK.numel())]).float()

    def adapt(self, sums_S: Tensor) -> None:
        too_many = sums_S[0] / sums_S[1] - self.top_k / self.num_experts
        self.strength *= self.config.growth ** too_many.sign()
        self.strength.clamp_(min=self.config.first_strength)
