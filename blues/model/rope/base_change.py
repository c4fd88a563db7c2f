"""A larger base for a longer context, and how large it must be."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.rope.rotary import RotaryEmbedding, check_positive


def smallest_base(length: int) -> float:
    """The base that a context of `length` tokens needs to be really used: 0.0424 length^1.628 (arXiv 2405.14591)."""
    return 0.0424 * length**1.628


class BaseChange(RotaryEmbedding, variant="base_change"):
    """Adjusted base frequency (arXiv 2309.16039): the base that a context of max_seq_len needs (arXiv 2405.14591).

    theta: None is the larger of 10,000 and `smallest_base(max_seq_len)`. One below that bound is warned about.
    """

    @cfg.configclass
    class Config(RotaryEmbedding.Config):
        theta: float | None = None

        def __post_init__(self) -> None:
            if self.theta is not None:
                check_positive("theta", self.theta)

    config: Config

    def __init__(self, config: Config, *, head_dim: int, max_seq_len: int | None = None) -> None:
        super().__init__(config, head_dim=head_dim, max_seq_len=max_seq_len)
        if max_seq_len is None:
            if config.theta is None:
                raise ConfigError("attention.rope.theta: base_change needs it where max_seq_len is unknown")
            self.theta = config.theta
            return
        least = smallest_base(max_seq_len)
        self.theta = max(10_000.0, least) if config.theta is None else config.theta
        if self.theta < least:
            warnings.warn(
                f"attention.rope.theta: a base of {self.theta:,.0f} is below the {least:,.0f} that a context of "
                f"{max_seq_len} tokens needs (arXiv 2405.14591); its far end may not be used",
                stacklevel=2,
            )

    def frequencies(self, device: torch.device, length: int | Tensor) -> Tensor:
        """See the family."""
        return self.geometric(device, self.theta)
