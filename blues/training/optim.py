"""Optimizers and learning-rate schedules: two families of variants.

In: a model and the number of steps. Out: a torch optimizer over parameter groups, and a pure function from the step
to the factor by which the peak learning rate is multiplied.
"""

from __future__ import annotations

import abc
import math
from typing import Any, ClassVar

import torch
from torch import nn

from blues import config as cfg
from blues.errors import ConfigError


class Optimizer(abc.ABC, cfg.Configurable, family="optimizer"):
    """A way to update weights. `build()` gives the recipe; `make(model)` gives the torch optimizer."""

    state_names: ClassVar[tuple[str, ...]] = ()
    """Per-parameter state tensors (shaped like the parameter) that a checkpoint has to keep."""

    @cfg.configclass
    class Config(cfg.Config):
        """lr: the peak learning rate, reached at the end of the warm-up. weight_decay: decoupled, times lr a step."""

        lr: float = 6e-4
        weight_decay: float = 0.1

        def __post_init__(self) -> None:
            if not self.lr > 0:
                raise ConfigError(f"lr must be > 0, got {self.lr}")
            if self.weight_decay < 0:
                raise ConfigError(f"weight_decay must be >= 0, got {self.weight_decay}")

    config: Config

    def __init__(self, config: Optimizer.Config) -> None:
        self.config = config

    @abc.abstractmethod
    def make(self, model: nn.Module) -> torch.optim.Optimizer:
        """The torch optimizer over `parameter_groups(model, weight_decay)`."""


class AdamW(Optimizer, variant="adamw"):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

    state_names = ("exp_avg", "exp_avg_sq")

    @cfg.configclass
    class Config(Optimizer.Config):
        """betas: decay of the running mean and of the running square of the gradient. eps: added to the root."""

        betas: tuple[float, ...] = (0.9, 0.95)
        eps: float = 1e-8

        def __post_init__(self) -> None:
            super().__post_init__()
            if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
                raise ConfigError(f"betas must be two numbers in [0, 1), got {list(self.betas)}")
            if not self.eps > 0:
                raise ConfigError(f"eps must be > 0, got {self.eps}")

    config: Config

    def make(self, model: nn.Module) -> torch.optim.Optimizer:
        config = self.config
        on_cuda = any(parameter.is_cuda for parameter in model.parameters())
        return torch.optim.AdamW(
            parameter_groups(model, config.weight_decay),
            lr=config.lr,
            betas=(config.betas[0], config.betas[1]),
            eps=config.eps,
            fused=True if on_cuda else None,
        )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay; gains, biases and embeddings without.

    A gain's neutral value is one, so pulling it to zero is no regularization. An embedding row shrinks at every step
    but is fed only when its token occurs, so decay erases rare tokens; OLMo 2 (arXiv 2501.00656) measured steadier
    training without it. A tied output head is the embedding and goes with it.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (free if parameter.ndim < 2 or id(parameter) in embeddings else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Schedule(abc.ABC, cfg.Configurable, family="schedule"):
    """The learning rate over time: a linear warm-up, then a decay from 1 to `final_fraction` of the peak."""

    @cfg.configclass
    class Config(cfg.Config):
        """warmup_steps: steps of linear rise. final_fraction: the last step's rate as a fraction of the peak."""

        warmup_steps: int = 100
        final_fraction: float = 0.1

        def __post_init__(self) -> None:
            if self.warmup_steps < 0:
                raise ConfigError(f"warmup_steps must be >= 0, got {self.warmup_steps}")
            if not 0 <= self.final_fraction <= 1:
                raise ConfigError(f"final_fraction must be between 0 and 1, got {self.final_fraction}")

    config: Config

    def __init__(self, config: Schedule.Config, *, total_steps: int) -> None:
        self.config = config
        self.total_steps = total_steps

    def factor(self, step: int) -> float:
        """The factor on the peak learning rate for update number `step` (the first update is 0)."""
        warmup = min(self.config.warmup_steps, self.total_steps)
        if step < warmup:
            return (step + 1) / warmup
        remaining = max(1, self.total_steps - 1 - warmup)
        return self.decay(min(1.0, (step - warmup) / remaining))

    @abc.abstractmethod
    def decay(self, progress: float) -> float:
        """The factor after the warm-up; `progress` runs from 0 to 1 at the last update."""


class Constant(Schedule, variant="constant"):
    """No decay; `final_fraction` has no effect (a constant rate, as in Hägele et al. 2024, arXiv 2405.18392)."""

    def decay(self, progress: float) -> float:
        return 1.0


class Linear(Schedule, variant="linear"):
    """A straight line to `final_fraction` (BERT, arXiv 1810.04805)."""

    def decay(self, progress: float) -> float:
        return 1.0 - (1.0 - self.config.final_fraction) * progress


class Cosine(Schedule, variant="cosine"):
    """Half a cosine wave to `final_fraction` (Loshchilov and Hutter 2017, arXiv 1608.03983)."""

    def decay(self, progress: float) -> float:
        final = self.config.final_fraction
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


class WarmupStableDecay(Schedule, variant="wsd"):
    """Constant, then a last stretch of `1 - sqrt` decay (Hägele et al. 2024, arXiv 2405.18392)."""

    @cfg.configclass
    class Config(Schedule.Config):
        """decay_fraction: the share of the steps after the warm-up that the last stretch takes."""

        decay_fraction: float = 0.2

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 < self.decay_fraction <= 1:
                raise ConfigError(f"decay_fraction must be in (0, 1], got {self.decay_fraction}")

    config: Config

    def decay(self, progress: float) -> float:
        start = 1.0 - self.config.decay_fraction
        if progress <= start:
            return 1.0
        final = self.config.final_fraction
        return final + (1.0 - final) * (1.0 - math.sqrt((progress - start) / self.config.decay_fraction))
