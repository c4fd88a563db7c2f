"""Patterns to test with: one or more settings of every registered one, small enough to bite at 40 tokens."""

from __future__ import annotations

import torch

from blues.config import FAMILIES
from blues.model.attention.patterns import (
    AdaptiveWindow,
    AllOf,
    AnyOf,
    AttentionPattern,
    BlockList,
    BlockSparse,
    ByHead,
    ByLayer,
    Causal,
    Dilated,
    EntropyWindow,
    Fixed,
    GlobalTokens,
    LocalGlobal,
    PrefixSyntax,
    SlidingWindow,
    Strided,
    TokenTree,
)

WINDOW, SINKS = SlidingWindow.Config(window=5), SlidingWindow.Config(window=3, sinks=2)
HEADS = BlockList.Config(block=4, heads=("1.3.5.9.11.21", "1.2.4.8.10.20", "1.3.7.f.1f.3f", "1.3.6.c.18.30"))

PATTERNS: dict[str, tuple[AttentionPattern.Config, ...]] = {
    "causal": (Causal.Config(),),
    "sliding_window": (WINDOW, SINKS, SlidingWindow.Config(window=1)),
    "global_tokens": (GlobalTokens.Config(window=3, tokens=2), GlobalTokens.Config(window=2, tokens=1, every=7)),
    "dilated": (Dilated.Config(segments=(4, 16), dilations=(1, 3)),),
    "strided": (Strided.Config(stride=4),),
    "fixed": (Fixed.Config(block=5, summary=2),),
    "block_sparse": (BlockSparse.Config(block=4, near=1, first=1, random=1, seed=3),),
    "block_list": (BlockList.Config(block=4, heads=("1.3.5.9.11.21",)), HEADS),
    "all_of": (AllOf.Config(patterns=(WINDOW, Strided.Config(stride=3))), AllOf.Config(patterns=(HEADS, WINDOW))),
    "any_of": (AnyOf.Config(patterns=(SINKS, Dilated.Config(segments=(16,), dilations=(4,)))),),
    "by_layer": (ByLayer.Config(patterns=(WINDOW, Causal.Config())),),
    "local_global": (LocalGlobal.Config(local_layers=1, window=5),),
    "by_head": (ByHead.Config(patterns=(WINDOW, Strided.Config(stride=4))),),
    "adaptive_window": (AdaptiveWindow.Config(window=12, ramp=4, initial=0.4, span_penalty=0.01),),
    "entropy_window": (EntropyWindow.Config(windows=(4,)),),
    "prefix_syntax": (PrefixSyntax.Config(window=2),),
}

ALL = [config for variant in FAMILIES["attention_pattern"].variants for config in PATTERNS[variant]]
"""A variant without an entry above fails here: whoever registers one adds it."""


def name_of(config: AttentionPattern.Config) -> str:
    return f"{config._variant}-{ALL.index(config)}"


def random_tree(rows: int, length: int, seed: int = 0, whole: int | None = None) -> TokenTree:
    """The tree of a random text as it is known after `length` of its tokens: each opens a node and may close others.

    tin is the token's number; tout that of the token which closed its node, and 2**40 while it is open. `whole` is the
    length of the text, if it goes on: the trees of its beginnings differ only in which nodes are closed.
    """
    generator = torch.Generator().manual_seed(seed)
    closes = torch.randint(0, 4, (rows, whole or length), generator=generator).tolist()
    tout_BS = torch.full((rows, length), 2**40)
    for row in range(rows):
        stack: list[int] = []
        for token in range(length):
            for _ in range(min(closes[row][token] - 1, len(stack))):
                tout_BS[row, stack.pop()] = token
            stack.append(token)
    return TokenTree(torch.arange(length).expand(rows, length), tout_BS)
