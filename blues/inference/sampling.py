"""Choosing the next token from logits.

In: `logits_BV` of the last position and one uniform number per row. Out: `ids_B`. Everything here is a pure function:
the same logits, settings and uniform numbers give the same ids on every device and whatever else is in the batch.

Legend: B rows of a batch, V vocabulary (padded).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from blues import config as cfg
from blues.config import Configurable, configclass
from blues.errors import CheckpointError, ConfigError


class Sampling(Configurable):
    """Turns logits into token ids; `temperature=0` is greedy. Rows draw from streams of their own (seed, row)."""

    @configclass
    class Config(cfg.Config):
        max_length: int = 128
        """New tokens at most, beyond the prompt."""
        temperature: float = 0.8
        """Divides the logits; 0 takes the most probable token."""
        top_p: float = 0.95
        """Keep the smallest set of tokens whose probability reaches this (nucleus, arXiv 1904.09751); 1 = off."""
        top_k: int = 0
        """Keep this many of the most probable tokens; 0 = off."""
        seed: int = 0
        """The same seed, prompt and checkpoint give the same text."""

        def __post_init__(self) -> None:
            if self.max_length < 1:
                raise ConfigError(f"max_length (--max-length) must be at least 1 new token, got {self.max_length}")
            if not (math.isfinite(self.temperature) and self.temperature >= 0):
                raise ConfigError(
                    f"temperature (--temperature) must be 0 (greedy) or a positive number, got {self.temperature}"
                )
            if not 0 < self.top_p <= 1:
                raise ConfigError(f"top_p (--top-p) must lie in (0, 1], where 1 switches it off, got {self.top_p}")
            if self.top_k < 0:
                raise ConfigError(f"top_k (--top-k) must be 0 (off) or a positive count, got {self.top_k}")
            if self.seed < 0:
                raise ConfigError(f"seed (--seed) must be 0 or a positive whole number, got {self.seed}")

    def __init__(self, config: Config, *, allowed_V: Tensor, rows: int = 1) -> None:
        """`allowed_V` (bool): ids that stand for something; the vocabulary's padding is never chosen.
        `rows`: batch size."""
        self.config = config
        self.allowed_V = allowed_V
        self.streams = [np.random.Generator(np.random.PCG64([config.seed, row])) for row in range(rows)]

    def __call__(self, logits_BV: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """`logits_BV` (any float type) -> `ids_B` (int64), advancing the stream of every row by one number.

        `rows`: which of the batch's rows these are; all of them by default.

        Raises:
            CheckpointError: a row holds no finite logits to choose from, as a diverged training run leaves behind.
        """
        streams = self.streams if rows is None else [self.streams[row] for row in rows]
        uniform_B = torch.tensor([stream.random() for stream in streams], dtype=torch.float64)
        logits_BV = logits_BV.float().masked_fill(~self.allowed_V, -torch.inf)
        if not logits_BV.amax(dim=-1).isfinite().all():
            raise CheckpointError(
                "the model's logits are not finite numbers, so no token can be chosen: its training has diverged; "
                "use an earlier checkpoint"
            )
        return sample(logits_BV, self.config, uniform_B)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """All but the `k` largest logits of each row at minus infinity; the lower id wins a tie. `k=0` keeps all."""
    if k == 0 or k >= logits_BV.shape[-1]:
        return logits_BV
    order_BV = logits_BV.argsort(dim=-1, descending=True, stable=True)
    return logits_BV.scatter(-1, order_BV[..., k:], -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """All logits outside the smallest set with probability >= `p` at minus infinity; the lower id wins a tie.

    The most probable token is always kept (Holtzman et al., arXiv 1904.09751). `p=1` keeps all.
    """
    if p >= 1:
        return logits_BV
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = sorted_BV.double().softmax(dim=-1)
    before_BV = torch.nn.functional.pad(probs_BV.cumsum(dim=-1)[..., :-1], (1, 0))  # mass of those ahead of it
    return logits_BV.scatter(-1, order_BV, sorted_BV.masked_fill(before_BV >= p, -torch.inf))


def draw(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Inverse-transform sampling: the first id whose cumulative probability exceeds `uniform_B` in [0, 1).

    Computed in float64, rows need not sum to one. An id of probability 0 is never drawn.
    """
    cumulative_BV = probs_BV.double().cumsum(dim=-1)
    total_B1 = cumulative_BV[..., -1:]
    target_B1 = torch.minimum(
        uniform_B.to(total_B1)[..., None] * total_B1, total_B1.nextafter(torch.zeros_like(total_B1))
    )
    return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1)


def sample(logits_BV: Tensor, config: Sampling.Config, uniform_B: Tensor) -> Tensor:
    """`ids_B`: temperature, then top-k, then top-p over what is left, then `draw`; greedy at temperature 0."""
    if config.temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.double()
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / config.temperature  # largest 0: cannot overflow
    logits_BV = keep_top_p(keep_top_k(logits_BV, config.top_k), config.top_p)
    return draw(logits_BV.softmax(dim=-1), uniform_B)
