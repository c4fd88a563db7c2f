"""The family of rotary position embeddings, and the rotation itself (RoFormer, arXiv 2104.09864).

In: positions. Out: a `Rotation` (cosines and sines) that `rotate` applies to queries and keys, so that a score depends
on the distance of its positions alone.

Channel c is paired with channel c + C/2 (the layout of GPT-NeoX and transformers). Nothing is a buffer: a buffer would
be rounded when the module is converted to bfloat16, and an angle of position 2000 in bfloat16 is noise.

Legend: B batch (or 1), T positions, H heads, C channels of a head, P = C/2 pairs.
"""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.kernels.precision import at_least_float32
from blues.model.rope.tables import Rotation, Tables


class RotaryEmbedding(cfg.Configurable, family="rope"):
    """How fast each pair of channels turns with the position.

    attention_factor: what cosines and sines are multiplied by; scores grow by its square.
    depends_on_length: whether the frequencies change with the length of the text; in a batch, of its longest row.
    """

    @cfg.configclass
    class Config(cfg.Config):
        pass

    attention_factor: float = 1.0
    depends_on_length: bool = False

    def __init__(self, config: Config, *, head_dim: int, max_seq_len: int | None = None) -> None:
        """`head_dim`: channels of a head, even. `max_seq_len`: tokens that the model sees at once.

        Raises:
            ConfigError: `head_dim` is odd, or a setting does not fit one of the two.
        """
        if head_dim % 2:
            raise ConfigError(
                f"attention.head_dim: rotary embeddings turn pairs of channels, got {head_dim}; make it even"
            )
        self.config = config
        self.head_dim = head_dim
        self.max_seq_len = max_seq_len
        self.tables = Tables()

    @abc.abstractmethod
    def frequencies(self, device: torch.device, length: int | Tensor) -> Tensor:
        """Radians per position of each pair in a text of `length` tokens (an integer), (C/2,) float32."""

    def geometric(self, device: torch.device, theta: float | Tensor) -> Tensor:
        """theta ** (-2i/C) for each pair, (C/2,) float32."""
        exponents_P = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        return 1.0 / theta**exponents_P

    def length_key(self, length: int) -> int:
        """A number that is the same for lengths with the same frequencies."""
        return 0

    def angles(self, positions_BT: Tensor, length: int | Tensor) -> Tensor:
        """`angles_BTP` in a text of `length` tokens, float32."""
        return positions_BT[..., None].float() * self.frequencies(positions_BT.device, length)

    def compute(self, positions_BT: Tensor, length: int | None = None) -> Rotation:
        """The rotation at `positions_BT`, computed anew: the reference of `__call__`, same arguments."""
        longest: int | Tensor = 0 if length is None else length
        if length is None and self.depends_on_length:
            longest = positions_BT.max() + 1  # stays on the device
        angles_BTP = self.angles(positions_BT, longest)
        cos_BTP, sin_BTP = angles_BTP.cos(), angles_BTP.sin()
        if self.attention_factor != 1.0:
            cos_BTP, sin_BTP = cos_BTP * self.attention_factor, sin_BTP * self.attention_factor
        return Rotation(cos_BTP, sin_BTP)

    def __call__(self, positions_BT: Tensor, length: int | None = None) -> Rotation:
        """The rotation at `positions_BT` (integers) in a text of `length` tokens.

        `length`: above every position; rows of a table are then looked up. None if nobody knows it without asking the
        device: the rotation is then computed, the length being the last position's.
        """
        # A compiled graph fuses the computation, and a table that grows would be a reason to compile again; a tensor
        # of another kind (a fake one) must not enter the tables.
        if length is None or torch.compiler.is_compiling() or type(positions_BT) is not Tensor:
            return self.compute(positions_BT, length)
        cos_SP, sin_SP = self.tables.get(self, positions_BT.device, length)
        return Rotation(cos_SP[positions_BT], sin_SP[positions_BT])


class Geometric(RotaryEmbedding):
    """What starts from RoFormer's frequencies with a given base."""

    @cfg.configclass
    class Config(RotaryEmbedding.Config):
        theta: float = 10_000.0

        def __post_init__(self) -> None:
            check_positive("theta", self.theta)

    config: Config


class PlainRotary(Geometric, variant="plain"):
    """RoFormer's rotary embedding (arXiv 2104.09864): pair i turns theta ** (-2i/C) radians per position."""

    @cfg.configclass
    class Config(Geometric.Config):
        pass

    config: Config

    def frequencies(self, device: torch.device, length: int | Tensor) -> Tensor:
        """See the family."""
        return self.geometric(device, self.config.theta)


def rotate(x_BTHC: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair of channels of `x_BTHC` by its angle, in float32 or better; keeps shape and dtype."""
    first, second = at_least_float32(x_BTHC).chunk(2, dim=-1)
    cos, sin = rotation.cos_BTP[:, :, None], rotation.sin_BTP[:, :, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTHC.dtype)


def check_positive(name: str, value: float) -> None:
    """Raises ConfigError unless `value` is positive and finite."""
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{name}: must be positive, got {value}")
