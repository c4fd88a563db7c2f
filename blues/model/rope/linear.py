"""Position interpolation."""

from __future__ import annotations

import torch
from torch import Tensor

from blues import config as cfg
from blues.model.rope.extension import Scaled


class LinearInterpolation(Scaled, variant="linear"):
    """Position interpolation (arXiv 2306.15595): every pair turns `factor` times slower."""

    @cfg.configclass
    class Config(Scaled.Config):
        pass

    config: Config

    def frequencies(self, device: torch.device, length: int | Tensor) -> Tensor:
        """See the family."""
        return self.geometric(device, self.config.theta) / self.config.factor
