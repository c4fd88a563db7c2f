"""The scaling of Llama 3.1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.rope.extension import Extended


class Llama3(Extended, variant="llama3"):
    """Llama 3.1's scaling (arXiv 2407.21783): interpolation by wavelength, smooth between two bounds.

    Of the original length L, pairs with wavelengths below L / `high_freq_factor` stay, above L / `low_freq_factor` are
    slowed by `factor`, and between are mixed by the number of turns within L.
    """

    @cfg.configclass
    class Config(Extended.Config):
        low_freq_factor: float = 1.0
        high_freq_factor: float = 4.0

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.high_freq_factor > self.low_freq_factor > 0:
                raise ConfigError(
                    f"high_freq_factor: must be above low_freq_factor, both positive, got {self.high_freq_factor} and "
                    f"{self.low_freq_factor}"
                )

    config: Config

    def frequencies(self, device: torch.device, length: int | Tensor) -> Tensor:
        """See the family."""
        low, high = self.config.low_freq_factor, self.config.high_freq_factor
        fast_P = self.geometric(device, self.config.theta)
        turns_P = self.original_length * fast_P / (2 * math.pi)
        kept_P = ((turns_P - low) / (high - low)).clamp(0, 1)
        return (1 - kept_P) * fast_P / self.config.factor + kept_P * fast_P
