"""How much noise a router has in the course of training.

In: the noise that training begins with, and the share of the training that is done. Out: the noise now.
"""

from __future__ import annotations

import abc

from blues import config as cfg
from blues.errors import ConfigError


class NoiseSchedule(cfg.Configurable, family="router_noise"):
    """A family: the size of a router's noise or jitter over the training."""

    @cfg.configclass
    class Config(cfg.Config):
        pass

    def __init__(self, config: Config) -> None:
        self.config = config

    @abc.abstractmethod
    def at(self, progress: float, start: float) -> float:
        """The noise after `progress` (0..1) of the training that began with `start`."""


class ConstantNoise(NoiseSchedule, variant="constant"):
    """The same noise throughout (Shazeer et al. 2017, arXiv 1701.06538)."""

    def at(self, progress: float, start: float) -> float:
        return start


class LinearNoise(NoiseSchedule, variant="linear"):
    """A straight line from the first noise to `final` over the share `over` of training, then constant (Blues' own).

    The usual way from exploring experts to settling on them, as of an exploration rate.
    """

    @cfg.configclass
    class Config(NoiseSchedule.Config):
        final: float = 0.0
        over: float = 1.0

        def __post_init__(self) -> None:
            if self.final < 0:
                raise ConfigError(f"final: must not be negative, got {self.final}")
            if not 0 < self.over <= 1:
                raise ConfigError(f"over: must be a share of the training, above 0 and at most 1, got {self.over}")

    config: Config

    def at(self, progress: float, start: float) -> float:
        done = min(progress / self.config.over, 1.0)
        return start + (self.config.final - start) * done
