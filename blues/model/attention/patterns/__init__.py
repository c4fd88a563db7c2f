"""Which keys a query may see: a family of rules on positions that compose.

In: a configuration. Out: an `AttentionPattern`, a value that gives its rule as a dense mask, as a block mask of
FlexAttention and, where it can, as the window arguments of flash kernels.
"""

from blues.model.attention.patterns.adaptive import AdaptiveWindow, EntropyWindow, entropy_windows
from blues.model.attention.patterns.base import AttentionPattern, Pairs, TokenTree, pairs_of
from blues.model.attention.patterns.compose import AllOf, AnyOf, ByHead, ByLayer, LocalGlobal
from blues.model.attention.patterns.local import Causal, Dilated, GlobalTokens, SlidingWindow
from blues.model.attention.patterns.sparse import BlockList, BlockSparse, Fixed, Strided
from blues.model.attention.patterns.syntax import PrefixSyntax

__all__ = [
    "AdaptiveWindow",
    "AllOf",
    "AnyOf",
    "AttentionPattern",
    "BlockList",
    "BlockSparse",
    "ByHead",
    "ByLayer",
    "Causal",
    "Dilated",
    "EntropyWindow",
    "Fixed",
    "GlobalTokens",
    "LocalGlobal",
    "Pairs",
    "PrefixSyntax",
    "SlidingWindow",
    "Strided",
    "TokenTree",
    "entropy_windows",
    "pairs_of",
]
