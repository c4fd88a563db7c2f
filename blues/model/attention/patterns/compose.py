"""Patterns made of patterns: both, either, by layer, by head.

In: the members' rules. Out: one rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.attention.patterns.base import AttentionPattern, Pairs, at_least_one
from blues.model.attention.patterns.local import Causal, SlidingWindow

LOCAL = SlidingWindow.Config()


class Composed(AttentionPattern):
    """A pattern that holds others."""

    @cfg.configclass
    class Config(AttentionPattern.Config):
        patterns: tuple[AttentionPattern.Config, ...] = ()

        def __post_init__(self) -> None:
            if not self.patterns:
                raise ConfigError("patterns: must hold at least one pattern")

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._children: tuple[AttentionPattern, ...] = tuple(pattern.build() for pattern in config.patterns)

    @property
    def children(self) -> tuple[AttentionPattern, ...]:
        return self._children

    def for_layer(self, layer: int) -> AttentionPattern:
        resolved = tuple(child.for_layer(layer).config for child in self.children)
        return self if resolved == self.config.patterns else self.config.replace(patterns=resolved).build()

    def check(self, num_heads: int, num_layers: int) -> None:
        for child in self.children:
            if child.is_soft:
                raise ConfigError(
                    f"attention.pattern: {self.config._variant} cannot hold {child.config._variant}, which weighs "
                    "keys instead of hiding them; use it alone or in by_layer"
                )
        super().check(num_heads, num_layers)

    def _windows(self) -> list[int] | None:
        """How far back each member sees (-1: without limit), if all are plain windows."""
        windows = [child.window() for child in self.children]
        lefts = [window[0] for window in windows if window is not None and window[1] == 0]
        return lefts if len(lefts) == len(windows) else None


class AllOf(Composed, variant="all_of"):
    """What every one of `patterns` shows (intersection; composition of masks as in FlexAttention, arXiv 2412.05496)."""

    @cfg.configclass
    class Config(Composed.Config):
        patterns: tuple[AttentionPattern.Config, ...] = (Causal.Config(),)

    def rule(self, pairs: Pairs) -> Tensor:
        seen = self.children[0].rule(pairs)
        for child in self.children[1:]:
            seen = seen & child.rule(pairs)
        return seen

    def window(self) -> tuple[int, int] | None:
        lefts = self._windows()
        if lefts is None:
            return None
        return min((left for left in lefts if left >= 0), default=-1), 0


class AnyOf(Composed, variant="any_of"):
    """What at least one of `patterns` shows (union; composition of masks as in FlexAttention, arXiv 2412.05496)."""

    @cfg.configclass
    class Config(Composed.Config):
        patterns: tuple[AttentionPattern.Config, ...] = (Causal.Config(),)

    def rule(self, pairs: Pairs) -> Tensor:
        seen = self.children[0].rule(pairs)
        for child in self.children[1:]:
            seen = seen | child.rule(pairs)
        return seen

    def window(self) -> tuple[int, int] | None:
        lefts = self._windows()
        if lefts is None:
            return None
        return -1 if -1 in lefts else max(lefts), 0


class ByLayer(Composed, variant="by_layer"):
    """Layer n has pattern n of a cycle: local-global mixing (Gemma 3, arXiv 2503.19786).

    Gemma 3 has 5 local layers to a global one; the default is 1 to 1 (Gemma 2, arXiv 2408.00118).
    """

    @cfg.configclass
    class Config(Composed.Config):
        patterns: tuple[AttentionPattern.Config, ...] = (LOCAL, Causal.Config())

    def for_layer(self, layer: int) -> AttentionPattern:
        return self.children[layer % len(self.children)].for_layer(layer)

    def rule(self, pairs: Pairs) -> Tensor:
        raise TypeError("by_layer has a rule for each layer; ask for_layer(layer) for it")

    def check(self, num_heads: int, num_layers: int) -> None:
        if len(self.children) > num_layers:
            raise ConfigError(
                f"attention.pattern: by_layer has a cycle of {len(self.children)} patterns for {num_layers} layers, "
                "so its last would never be used"
            )
        for child in self.children:
            child.check(num_heads, num_layers)


class LocalGlobal(AttentionPattern, variant="local_global"):
    """`local_layers` layers of a sliding window, then one that sees all, and so on (Gemma 3, arXiv 2503.19786).

    The short form of `by_layer` for this mixture, whose numbers can be set and swept one by one.
    """

    @cfg.configclass
    class Config(AttentionPattern.Config):
        local_layers: int = 5
        window: int = 1024
        sinks: int = 0

        def __post_init__(self) -> None:
            at_least_one(self, "local_layers", "window")
            at_least_one(self, "sinks", least=0)

    config: Config

    def for_layer(self, layer: int) -> AttentionPattern:
        config = self.config
        if (layer + 1) % (config.local_layers + 1) == 0:
            return Causal.Config().build()
        return SlidingWindow.Config(window=config.window, sinks=config.sinks).build()

    def rule(self, pairs: Pairs) -> Tensor:
        raise TypeError("local_global has a rule for each layer; ask for_layer(layer) for it")

    def check(self, num_heads: int, num_layers: int) -> None:
        if self.config.local_layers >= num_layers:
            raise ConfigError(
                f"attention.pattern: local_global with local_layers={self.config.local_layers} leaves none of "
                f"{num_layers} layers global; set local_layers to at most {num_layers - 1}, or use sliding_window"
            )


class ByHead(Composed, variant="by_head"):
    """Head h has pattern h of a cycle (factorized heads of the Sparse Transformer, arXiv 1904.10509, sec. 5.1)."""

    @cfg.configclass
    class Config(Composed.Config):
        patterns: tuple[AttentionPattern.Config, ...] = (LOCAL, Causal.Config())

    @property
    def differs_by_head(self) -> bool:
        return len(set(self.children)) > 1 or any(child.differs_by_head for child in self.children)

    def rule(self, pairs: Pairs) -> Tensor:
        seen = self.children[0].rule(pairs)
        if not self.differs_by_head:
            return seen
        turn = pairs.head % len(self.children)
        for number, child in enumerate(self.children[1:], start=1):
            seen = torch.where(turn == number, child.rule(pairs), seen)
        return seen

    def window(self) -> tuple[int, int] | None:
        return None if self.differs_by_head else self.children[0].window()

    def check(self, num_heads: int, num_layers: int) -> None:
        if num_heads % len(self.children):
            raise ConfigError(
                f"attention.pattern: by_head has a cycle of {len(self.children)} patterns, which does not divide the "
                f"layer's {num_heads} heads"
            )
        super().check(num_heads, num_layers)
