"""Rotation of the fastest pairs alone."""

from __future__ import annotations

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.rope.rotary import Geometric


class PRoPE(Geometric, variant="p_rope"):
    """p-RoPE (arXiv 2410.06205): the slowest pairs do not turn, so they carry meaning over any distance.

    fraction: p, the share of the pairs that turn, the fastest first.
    """

    @cfg.configclass
    class Config(Geometric.Config):
        fraction: float = 0.75

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 < self.fraction <= 1:
                raise ConfigError(f"fraction: must be above 0 and at most 1, got {self.fraction}")

    config: Config

    def __init__(self, config: Config, *, head_dim: int, max_seq_len: int | None = None) -> None:
        super().__init__(config, head_dim=head_dim, max_seq_len=max_seq_len)
        self.turning = int(config.fraction * head_dim / 2)
        if not self.turning:
            raise ConfigError(
                f"attention.rope.fraction: {config.fraction} of {head_dim // 2} pairs of channels is none; "
                "raise it, or choose rope=nope"
            )

    def frequencies(self, device: torch.device, length: int | Tensor) -> Tensor:
        """See the family."""
        turns_P = torch.arange(self.head_dim // 2, device=device) < self.turning
        return self.geometric(device, self.config.theta) * turns_P
