"""YaRN: fast pairs stay, slow pairs are interpolated, and those between are mixed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.rope.extension import Extended
from blues.model.rope.rotary import check_positive


class YaRN(Extended, variant="yarn"):
    """YaRN (arXiv 2309.00071): NTK by parts, and sharper attention.

    Pairs that turn more than `beta_fast` times within the original length keep their speed, those that turn fewer than
    `beta_slow` times are slowed by `factor`; a ramp over the pairs lies between. Cosines and sines are multiplied by
    0.1 ln(factor) + 1, unless `attention_factor` is given, or `mscale` and `mscale_all_dim` (DeepSeek's, whose quotient
    counts). `truncate` rounds the ends of the ramp to whole channels, as the paper's code does.
    """

    @cfg.configclass
    class Config(Extended.Config):
        beta_fast: float = 32.0
        beta_slow: float = 1.0
        attention_factor: float | None = None
        mscale: float | None = None
        mscale_all_dim: float | None = None
        truncate: bool = True

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.theta <= 1:
                raise ConfigError(f"theta: YaRN tells fast pairs from slow ones by a base above 1, got {self.theta}")
            if not self.beta_fast > self.beta_slow > 0:
                raise ConfigError(
                    f"beta_fast: must be above beta_slow, both positive, got {self.beta_fast} and {self.beta_slow}"
                )
            for name in ("attention_factor", "mscale", "mscale_all_dim"):
                if (value := getattr(self, name)) is not None:
                    check_positive(name, value)
            if (self.mscale is None) != (self.mscale_all_dim is None):
                raise ConfigError("mscale: counts only together with mscale_all_dim; give both or none")
            if self.attention_factor is not None and self.mscale is not None:
                raise ConfigError("attention_factor: says what mscale and mscale_all_dim say; give one of them")

    config: Config

    def __init__(self, config: Config, *, head_dim: int, max_seq_len: int | None = None) -> None:
        super().__init__(config, head_dim=head_dim, max_seq_len=max_seq_len)
        self.attention_factor = _attention_factor(config)
        self.ramp = self._ramp()

    def frequencies(self, device: torch.device, length: int | Tensor) -> Tensor:
        """See the family."""
        fast_P = self.geometric(device, self.config.theta)
        low, high = self.ramp
        pairs_P = torch.arange(self.head_dim // 2, device=device, dtype=torch.float32)
        slow_P = ((pairs_P - low) / (high - low)).clamp(0, 1)
        return fast_P * (1 - slow_P) + fast_P / self.config.factor * slow_P

    def _ramp(self) -> tuple[float, float]:
        """The last pair that stays as it is, and the first that is interpolated whole."""
        low, high = self._pair(self.config.beta_fast), self._pair(self.config.beta_slow)
        if self.config.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        if low > high:
            raise ConfigError(
                f"attention.rope.original_length: within {self.original_length} tokens the pairs of base "
                f"{self.config.theta:g} all turn fewer times than beta_slow, or all more than beta_fast; YaRN has no "
                "ramp to lay between them"
            )
        return low, high if high != low else high + 0.001

    def _pair(self, turns: float) -> float:
        """The pair that turns so many times within the original length; pairs may be broken."""
        turned = math.log(self.original_length / (turns * 2 * math.pi))
        return self.head_dim * turned / (2 * math.log(self.config.theta))


def _attention_factor(config: YaRN.Config) -> float:
    if config.attention_factor is not None:
        return config.attention_factor
    scale = math.log(config.factor)
    if config.mscale is not None and config.mscale_all_dim is not None:
        return (0.1 * config.mscale * scale + 1.0) / (0.1 * config.mscale_all_dim * scale + 1.0)
    return 0.1 * scale + 1.0
