"""Rotary position embeddings (RoFormer, arXiv 2104.09864).

In: positions. Out: a `Rotation` (cosines and sines) that `rotate` applies to queries and keys, so that a score depends
on the distance of its positions alone.

Channel c is paired with channel c + C/2 (the layout of GPT-NeoX and transformers). Nothing is a buffer: a buffer would
be rounded when the module is converted to bfloat16, and an angle of position 2000 in bfloat16 is noise.

Legend: B batch (or 1), T positions, H heads, C channels of a head, P = C/2 pairs.
"""

from __future__ import annotations

import abc
from typing import NamedTuple

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.kernels.precision import at_least_float32


class Rotation(NamedTuple):
    """The rotation of each channel pair at each position, in float32."""

    cos_BTP: Tensor
    sin_BTP: Tensor


class RotaryEmbedding(cfg.Configurable, family="rope"):
    """A family: how fast each pair of channels turns with the position."""

    @cfg.configclass
    class Config(cfg.Config):
        pass

    def __init__(self, config: Config, *, head_dim: int) -> None:
        """`head_dim`: channels of a head, even.

        Raises:
            ConfigError: `head_dim` is odd.
        """
        if head_dim % 2:
            raise ConfigError(
                f"attention.head_dim: rotary embeddings turn pairs of channels, got {head_dim}; make it even"
            )
        self.config = config
        self.head_dim = head_dim

    @abc.abstractmethod
    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per position of each pair, (C/2,) float32."""

    def __call__(self, positions_BT: Tensor) -> Rotation:
        """The rotation at `positions_BT` (integers)."""
        angles_BTP = positions_BT[..., None].float() * self.frequencies(positions_BT.device)
        return Rotation(angles_BTP.cos(), angles_BTP.sin())


class PlainRotary(RotaryEmbedding, variant="plain"):
    """RoFormer's geometric frequencies: pair i turns theta ** (-2i/C) radians per position."""

    @cfg.configclass
    class Config(RotaryEmbedding.Config):
        theta: float = 10_000.0

        def __post_init__(self) -> None:
            if self.theta <= 0:
                raise ConfigError(f"theta: must be positive, got {self.theta}")

    def frequencies(self, device: torch.device) -> Tensor:
        exponents_P = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        return 1.0 / self.config.theta**exponents_P


def rotate(x_BTHC: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair of channels of `x_BTHC` by its angle, in float32 or better; keeps shape and dtype."""
    first, second = at_least_float32(x_BTHC).chunk(2, dim=-1)
    cos, sin = rotation.cos_BTP[:, :, None], rotation.sin_BTP[:, :, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTHC.dtype)
