"""Patterns of what is near: everything before, a window, every so many tokens, and tokens that all others see.

In: pairs of positions. Out: whether the query may see the key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.attention.patterns.base import AttentionPattern, Pairs, at_least_one


class Causal(AttentionPattern, variant="causal"):
    """A token sees itself and every token before it (decoder of Vaswani et al., arXiv 1706.03762)."""

    def rule(self, pairs: Pairs) -> Tensor:
        return pairs.key <= pairs.query

    def window(self) -> tuple[int, int]:
        return -1, 0


class SlidingWindow(AttentionPattern, variant="sliding_window"):
    """The last `window` tokens (Mistral, arXiv 2310.06825), and `sinks` first ones for all (StreamingLLM, 2309.17453).

    A token counts as one of its own window; window=1 sees nothing else. Sinks are the first tokens of a document where
    documents are told apart, and of the row elsewhere.
    """

    @cfg.configclass
    class Config(AttentionPattern.Config):
        window: int = 1024
        sinks: int = 0

        def __post_init__(self) -> None:
            at_least_one(self, "window")
            at_least_one(self, "sinks", least=0)

    config: Config

    def rule(self, pairs: Pairs) -> Tensor:
        near = pairs.query - pairs.key < self.config.window
        return near | (pairs.key < self.config.sinks) if self.config.sinks else near

    def window(self) -> tuple[int, int] | None:
        return None if self.config.sinks else (self.config.window - 1, 0)


class GlobalTokens(AttentionPattern, variant="global_tokens"):
    """A window, and global tokens that see all before them and are seen by all after (Longformer, arXiv 2004.05150).

    Global are the first `tokens` of a document, and with `every` > 0 those of every stretch of so many tokens: what is
    far away is then read through the global tokens in between (BigBird's internal global tokens, arXiv 2007.14062).
    """

    @cfg.configclass
    class Config(AttentionPattern.Config):
        window: int = 512
        tokens: int = 1
        every: int = 0

        def __post_init__(self) -> None:
            at_least_one(self, "window", "tokens")
            if self.every and self.every <= self.tokens:
                raise ConfigError(
                    f"every: must be 0 or more than tokens ({self.tokens}), or all are global; got {self.every}"
                )

    config: Config

    def rule(self, pairs: Pairs) -> Tensor:
        near = pairs.query - pairs.key < self.config.window
        return near | self._is_global(pairs.key) | self._is_global(pairs.query)

    def _is_global(self, position: Tensor) -> Tensor:
        return (position % self.config.every if self.config.every else position) < self.config.tokens


class Dilated(AttentionPattern, variant="dilated"):
    """Segments seen ever more thinly: any of several (segment, dilation) (LongNet, arXiv 2307.02486).

    A query sees a key of its own segment of `segments[i]` tokens whose distance is a multiple of `dilations[i]`, for
    any i. LongNet mixes the outputs of the pairs by their softmax denominators, which is a softmax over their union in
    which keys that several show count as often; here they count once, and every head has the same ones.
    """

    @cfg.configclass
    class Config(AttentionPattern.Config):
        segments: tuple[int, ...] = (64, 256, 1024)
        dilations: tuple[int, ...] = (1, 4, 16)

        def __post_init__(self) -> None:
            at_least_one(self, "segments", "dilations")
            if not self.segments or len(self.segments) != len(self.dilations):
                raise ConfigError(
                    f"dilations: must have one number for each of the {len(self.segments)} segments (at least one), "
                    f"got {len(self.dilations)}"
                )

    config: Config

    def rule(self, pairs: Pairs) -> Tensor:
        distance = pairs.query - pairs.key
        seen = torch.zeros_like(distance, dtype=torch.bool)
        for segment, dilation in zip(self.config.segments, self.config.dilations, strict=True):
            same = pairs.query // segment == pairs.key // segment
            seen = seen | (same & (distance % dilation == 0))
        return seen
