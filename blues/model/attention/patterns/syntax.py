"""Patterns that follow the structure of the text.

In: pairs of positions with the Euler intervals of a `TokenTree`. Out: whether the query may see the key.
"""

from __future__ import annotations

from torch import Tensor

from blues import config as cfg
from blues.model.attention.patterns.base import AttentionPattern, Pairs, at_least_one


class PrefixSyntax(AttentionPattern, variant="prefix_syntax"):
    """The last `window` tokens, and a token's ancestors in a tree that the prefix determines (Blues' own).

    Ancestry by Euler intervals: O(1) per pair, no path is walked. The tree comes with the forward
    (`Transformer.forward(..., tree=TokenTree(...))`); nodes that are still open are open for later tokens too, so a
    token never learns how the text before it goes on.
    """

    @cfg.configclass
    class Config(AttentionPattern.Config):
        window: int = 128

        def __post_init__(self) -> None:
            at_least_one(self, "window")

    config: Config

    @property
    def needs_tree(self) -> bool:
        return True

    def rule(self, pairs: Pairs) -> Tensor:
        if pairs.query_tin is None or pairs.key_tin is None or pairs.key_tout is None:
            raise ValueError("the attention pattern prefix_syntax needs a tree of the tokens: pass tree=TokenTree(...)")
        ancestor = (pairs.key_tin <= pairs.query_tin) & (pairs.query_tin < pairs.key_tout)
        return ancestor | (pairs.query - pairs.key < self.config.window)
