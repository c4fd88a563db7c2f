"""NTK-aware scaling: another base in the place of other positions, fixed or by the length of the text.

The base theta * s^(C/(C-2)) turns the slowest pair s times slower and leaves the fastest alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.rope.extension import Extended, Scaled


class NTKAware(Scaled, variant="ntk"):
    """NTK-aware scaling (arXiv 2309.00071, section 3.1): base theta * factor^(C/(C-2)), whatever the length."""

    @cfg.configclass
    class Config(Scaled.Config):
        pass

    config: Config

    def __init__(self, config: Config, *, head_dim: int, max_seq_len: int | None = None) -> None:
        super().__init__(config, head_dim=head_dim, max_seq_len=max_seq_len)
        self.theta = config.theta * config.factor ** ntk_exponent(head_dim)

    def frequencies(self, device: torch.device, length: int | Tensor) -> Tensor:
        """See the family."""
        return self.geometric(device, self.theta)


class DynamicNTK(Extended, variant="dynamic_ntk"):
    """Dynamic NTK scaling (arXiv 2309.00071, section 3.3): beyond the original length the base grows with the text.

    base = theta * (s l / L - (s - 1))^(C/(C-2)) for a text of l > L tokens: at factor s = 1 just what l / L asks for,
    above it more. All queries and keys of a forward turn by the base of its length, those in the cache too. But what
    a deeper layer reads of an earlier token was computed when the text was shorter, so beyond L generation is not the
    same computation as reading the whole text at once.
    """

    @cfg.configclass
    class Config(Extended.Config):
        pass

    config: Config
    depends_on_length = True

    def __init__(self, config: Config, *, head_dim: int, max_seq_len: int | None = None) -> None:
        super().__init__(config, head_dim=head_dim, max_seq_len=max_seq_len)
        self.exponent = ntk_exponent(head_dim)

    def length_key(self, length: int) -> int:
        """See the family."""
        return max(length, self.original_length)

    def frequencies(self, device: torch.device, length: int | Tensor) -> Tensor:
        """See the family."""
        L, factor = self.original_length, self.config.factor
        longest = length.clamp(min=L).double() if isinstance(length, Tensor) else max(length, L)
        stretch = factor * longest / L - (factor - 1)
        return self.geometric(device, self.config.theta * stretch**self.exponent)


def ntk_exponent(head_dim: int) -> float:
    """C / (C - 2).

    Raises:
        ConfigError: a single pair of channels, which is the fastest and the slowest at once.
    """
    if head_dim <= 2:
        raise ConfigError(f"attention.head_dim: NTK-aware scaling needs two pairs of channels, got {head_dim} channels")
    return head_dim / (head_dim - 2)
