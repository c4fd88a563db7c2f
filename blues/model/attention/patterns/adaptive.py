"""Windows that fit themselves to the model: learned per head, or derived per layer from measured entropy.

In: distances of queries and keys; measured entropies. Out: whether a query may see a key; a window for each layer.

Legend: H heads, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.attention.patterns.base import AttentionPattern, Pairs, at_least_one
from blues.model.attention.patterns.local import SlidingWindow


class AdaptiveWindow(AttentionPattern, variant="adaptive_window"):
    """A window learned per head: keys count less beyond it, along a ramp (adaptive span, arXiv 1905.07799).

    A key at distance x counts m(x) = clamp((ramp + z - x) / ramp, 0, 1) in the softmax; the span z of each head, 0 to
    `window` tokens, is learned and starts at `initial` x `window`. `span_penalty` x the mean span is added to the loss.
    """

    @cfg.configclass
    class Config(AttentionPattern.Config):
        window: int = 1024
        ramp: int = 32
        initial: float = 0.5
        span_penalty: float = 2e-6

        def __post_init__(self) -> None:
            at_least_one(self, "window", "ramp")
            if not 0 < self.initial < 1:
                raise ConfigError(f"initial: must be a share of the window between 0 and 1, got {self.initial}")
            if self.span_penalty < 0:
                raise ConfigError(f"span_penalty: must not be negative, got {self.span_penalty}")

    config: Config

    @property
    def is_soft(self) -> bool:
        return True

    def rule(self, pairs: Pairs) -> Tensor:
        """What the widest span shows at all."""
        return pairs.query - pairs.key < self.config.window + self.config.ramp


class EntropyWindow(AttentionPattern, variant="entropy_window"):
    """A window per layer from the measured entropy of its attention (Blues' own; attention entropy, arXiv 2303.06296).

    Layers that read few keys get short windows, see `entropy_windows`. `windows` has one number per layer, or one for
    all.
    """

    @cfg.configclass
    class Config(AttentionPattern.Config):
        windows: tuple[int, ...] = (1024,)

        def __post_init__(self) -> None:
            at_least_one(self, "windows")
            if not self.windows:
                raise ConfigError("windows: must have one number per layer")

    config: Config

    def for_layer(self, layer: int) -> AttentionPattern:
        return SlidingWindow.Config(window=self.config.windows[layer % len(self.config.windows)]).build()

    def rule(self, pairs: Pairs) -> Tensor:
        raise TypeError("entropy_window has a rule for each layer; ask for_layer(layer) for it")

    def check(self, num_heads: int, num_layers: int) -> None:
        if len(self.config.windows) not in (1, num_layers):
            raise ConfigError(
                f"attention.pattern: entropy_window has {len(self.config.windows)} windows for {num_layers} "
                "layers; give one per layer, or one for all"
            )


def entropy_windows(
    entropy_LH: Sequence[Sequence[float]] | Tensor, *, slack: float = 4.0, multiple: int = 64, most: int
) -> EntropyWindow.Config:
    """Windows of `slack` times the number of keys that the layer's most undecided head really reads.

    exp(entropy) of a distribution is the number of keys that, read equally, would be as undecided.

    Args:
        entropy_LH: mean entropy of each head's attention in nats (`AttentionMass.entropy_LH`).
        multiple: windows are rounded up to multiples of this.
        most: the longest window, e.g. the sequence length.

    Raises:
        ConfigError: `slack` below 1 or `multiple` or `most` below 1.
    """
    if slack < 1 or multiple < 1 or most < 1:
        raise ConfigError(f"slack, multiple and most must be at least 1, got {slack}, {multiple} and {most}")
    keys_L = torch.as_tensor(entropy_LH).double().exp().amax(dim=-1)
    windows = (min(most, multiple * math.ceil(slack * keys / multiple)) for keys in keys_L.tolist())
    return EntropyWindow.Config(windows=tuple(windows))
