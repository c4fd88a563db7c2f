"""The mixture-of-experts layer: a router and its experts in the place of a feed-forward layer.

In: the residual stream after its norm. Out: the layer's addition to it, and the `Routing` for losses and metrics.

Legend: B batch, T time (in `Routing`: batch and time flattened), D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.context import Context
from blues.model.moe.experts import Dispatch, Experts
from blues.model.moe.routers import NoisyTopK
from blues.model.moe.routing import Router, Routing

Scope = Literal["micro_batch", "sequence", "global_batch"]


class MoE(nn.Module, cfg.Configurable):
    """Token-choice mixture of SwiGLU experts without capacity: no token is dropped."""

    @cfg.configclass
    class Config(cfg.Config):
        num_experts: int = 8
        top_k: int = 2
        ffn_dim: int = 2048
        every: int = 2
        """Layer i (from 0) is a mixture iff (i + 1) % every == 0."""
        router: Router.Config = NoisyTopK.Config()
        load_balancing_weight: float = 0.01
        load_balancing_scope: Scope = "micro_batch"
        """Over which tokens the load is to be balanced, see `blues.model.losses`."""
        router_z_weight: float = 0.001
        dispatch: Dispatch = "auto"

        def __post_init__(self) -> None:
            for name in ("num_experts", "top_k", "ffn_dim", "every"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
            if self.top_k > self.num_experts:
                raise ConfigError(f"top_k: cannot exceed num_experts ({self.num_experts}), got {self.top_k}")
            for name in ("load_balancing_weight", "router_z_weight"):
                if getattr(self, name) < 0:
                    raise ConfigError(f"{name}: must not be negative, got {getattr(self, name)}")

    def __init__(self, config: Config, *, dim: int, std: float, output_std: float, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.router: Router = config.router.build(
            dim=dim, num_experts=config.num_experts, top_k=config.top_k, std=std, generator=generator
        )
        self.experts = Experts(
            dim=dim,
            ffn_dim=config.ffn_dim,
            num_experts=config.num_experts,
            dispatch=config.dispatch,
            empty_slots=self.router.empty_slots,
            std=std,
            output_std=output_std,
            generator=generator,
        )

    def forward(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Routing]:
        """(B, T, D) -> (B, T, D) and the routing of its B*T tokens."""
        x_TD = x_BTD.flatten(0, 1)
        routing = self.router(x_TD, context)
        return self.experts(x_TD, routing).unflatten(0, x_BTD.shape[:2]), routing


def mixtures(model: nn.Module) -> list[tuple[int, MoE]]:
    """The mixture layers of a `Transformer` with their numbers among all layers (from 0), in order."""
    layers = enumerate(block.get_submodule("feed_forward") for block in model.get_submodule("blocks").children())
    return [(layer, moe) for layer, moe in layers if isinstance(moe, MoE)]
