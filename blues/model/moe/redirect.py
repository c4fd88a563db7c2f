"""What stands behind a router that may choose among more experts than there are: merged and constant experts.

In: tokens and a routing to R experts, as they were before pruning. Out: the experts' weighted sum, from the E < R that
are left. The router stays as it was trained; only what its choices mean has changed.

Legend: T tokens, K slots per token, D width, R experts that the router knows, E experts with weights, N = R - E.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.moe.experts import Experts
from blues.model.moe.routing import Routing


class Redirect(nn.Module, cfg.Configurable, family="redirect"):
    """A family: what becomes of a token that the router sends to an expert which pruning took away."""

    @cfg.configclass
    class Config(cfg.Config):
        pass

    target_R: Tensor

    def __init__(self, config: Config, *, dim: int, num_experts: int, num_routed: int) -> None:
        """
        Raises:
            ConfigError: the router knows no more experts than there are.
        """
        super().__init__()
        if num_routed <= num_experts:
            raise ConfigError(
                f"moe.redirect: the router knows {num_routed} experts and there are {num_experts}; a redirect is for "
                "routers that know more"
            )
        self.config, self.num_experts, self.num_routed = config, num_experts, num_routed
        self.register_buffer("target_R", torch.arange(num_routed))

    @abc.abstractmethod
    def forward(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """`y_TD` of tokens that are routed to 0..R-1 (R: to none)."""

    def targets(self, ids_TK: Tensor) -> Tensor:
        """`targets_TK` of the router's choices; an empty slot stays the highest of all numbers, R."""
        table = torch.cat([self.target_R, self.target_R.new_full((1,), self.num_routed)])
        return table[ids_TK]


class MergedExperts(Redirect, variant="merged"):
    """Several of the router's choices are one expert: what merging leaves (M-SMoE, arXiv 2310.01334).

    A token whose choices were merged into one goes through that one with the sum of their weights."""

    def forward(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        return experts(x_TD, routing._replace(ids_TK=self.targets(routing.ids_TK)))


class ConstantExperts(Redirect, variant="constant"):
    """Some of the router's choices are constant vectors: the mean output of the expert there (MoNE, arXiv 2507.00390).

    Numbers from E on mean these; they are learned with everything else."""

    def __init__(self, config: Redirect.Config, *, dim: int, num_experts: int, num_routed: int) -> None:
        super().__init__(config, dim=dim, num_experts=num_experts, num_routed=num_routed)
        self.constant_ND = nn.Parameter(torch.zeros(num_routed - num_experts, dim))

    def forward(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        targets_TK = self.targets(routing.ids_TK)
        y_TD = experts(x_TD, routing._replace(ids_TK=targets_TK))
        constants = self.num_routed - self.num_experts
        # One column more takes the weights of slots that hold a real expert or none.
        columns_TK = torch.where(targets_TK < self.num_routed, targets_TK - self.num_experts, -1)
        columns_TK = columns_TK.where(columns_TK >= 0, constants)
        weights_TK = routing.weights_TK
        weight_TN = weights_TK.new_zeros(len(x_TD), constants + 1).scatter_add(1, columns_TK, weights_TK)
        return y_TD + (weight_TN[:, :constants] @ self.constant_ND.to(weights_TK.dtype)).to(y_TD.dtype)
