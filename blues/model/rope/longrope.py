"""LongRoPE: a factor of its own for every pair, one list for short texts and one for long ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.rope.extension import Extended
from blues.model.rope.ntk import ntk_exponent
from blues.model.rope.rotary import check_positive


class LongRoPE(Extended, variant="longrope"):
    """LongRoPE (arXiv 2402.13753): each pair is slowed by a factor of its own, found by search.

    short_factor, long_factor: one for each of the C/2 pairs, for texts up to the original length and beyond it. Left
    out they are 1 and the NTK-aware factors, from which the paper's search sets out. Cosines and sines are multiplied
    by sqrt(1 + ln(factor) / ln(original length)) at any length, unless `attention_factor` is given.
    """

    @cfg.configclass
    class Config(Extended.Config):
        short_factor: tuple[float, ...] = ()
        long_factor: tuple[float, ...] = ()
        attention_factor: float | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("short_factor", "long_factor"):
                for index, value in enumerate(getattr(self, name)):
                    check_positive(f"{name}[{index}]", value)
            if self.attention_factor is not None:
                check_positive("attention_factor", self.attention_factor)

    config: Config
    depends_on_length = True

    def __init__(self, config: Config, *, head_dim: int, max_seq_len: int | None = None) -> None:
        super().__init__(config, head_dim=head_dim, max_seq_len=max_seq_len)
        pairs = head_dim // 2
        for name in ("short_factor", "long_factor"):
            given = len(getattr(config, name))
            if given not in (0, pairs):
                raise ConfigError(
                    f"attention.rope.{name}: needs one factor for each of the {pairs} pairs of channels (head_dim "
                    f"{head_dim}), got {given}"
                )
        self.short_factor = config.short_factor or (1.0,) * pairs
        self.long_factor = config.long_factor or tuple(
            config.factor ** (2 * pair / head_dim * ntk_exponent(head_dim)) for pair in range(pairs)
        )
        self.attention_factor = config.attention_factor or math.sqrt(
            1 + math.log(config.factor) / math.log(self.original_length)
        )

    def length_key(self, length: int) -> int:
        """See the family."""
        return int(length > self.original_length)

    def frequencies(self, device: torch.device, length: int | Tensor) -> Tensor:
        """See the family."""
        if isinstance(length, Tensor):
            factors_P = torch.where(
                length > self.original_length,
                torch.tensor(self.long_factor, device=device),
                torch.tensor(self.short_factor, device=device),
            )
        else:
            factors = self.long_factor if length > self.original_length else self.short_factor
            factors_P = torch.tensor(factors, device=device, dtype=torch.float32)
        return self.geometric(device, self.config.theta) / factors_P
