"""Experts that every token goes to, beside those it is routed to.

In: tokens. Out: what the shared experts add to the layer's output.

Legend: T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from blues import config as cfg
from blues.errors import ConfigError
from blues.kernels.precision import at_least_float32
from blues.model.layers import Linear, SwiGLU


class SharedExperts(nn.Module, cfg.Configurable, family="shared_experts"):
    """A family: experts that are always active."""

    @cfg.configclass
    class Config(cfg.Config):
        """number: of shared experts. ffn_dim: the width of one; null: as that of a routed one."""

        number: int = 1
        ffn_dim: int | None = None

        def __post_init__(self) -> None:
            for name in ("number", "ffn_dim"):
                value = getattr(self, name)
                if value is not None and value < 1:
                    raise ConfigError(f"{name}: must be at least 1, got {value}")

    def __init__(
        self,
        config: Config,
        *,
        dim: int,
        ffn_dim: int,
        std: float,
        output_std: float,
        generator: torch.Generator,
    ) -> None:
        """`ffn_dim`: the width of a routed expert."""
        super().__init__()
        self.config = config
        # SwiGLUs side by side are one SwiGLU of the joint width: one product instead of several.
        width = config.number * (config.ffn_dim or ffn_dim)
        self.experts = SwiGLU(dim, width, std=std, output_std=output_std, generator=generator)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.experts(x_TD)


class PlainShared(SharedExperts, variant="plain"):
    """Shared experts added as they are (DeepSeekMoE, arXiv 2401.06066)."""


class GatedShared(SharedExperts, variant="gated"):
    """Shared experts times a sigmoid gate of the token (Qwen2-MoE, arXiv 2407.10671; its modelling code)."""

    def __init__(
        self, config: SharedExperts.Config, *, dim: int, std: float, generator: torch.Generator, **rest: Any
    ) -> None:
        super().__init__(config, dim=dim, std=std, generator=generator, **rest)
        self.gate = Linear(dim, 1, std=std, generator=generator)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD = self.experts(x_TD)
        return y_TD * at_least_float32(self.gate(x_TD)).sigmoid().to(y_TD.dtype)
