"""Patterns of blocks and strides.

In: pairs of positions. Out: whether the query may see the key.

Legend: H heads, N blocks of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.attention.patterns.base import AttentionPattern, Pairs, at_least_one

PRIME = 32_749
"""The largest below 2**15: products of residues fit the 32-bit integers of a kernel."""


class Strided(AttentionPattern, variant="strided"):
    """The last `stride` tokens and every `stride`-th before (Sparse Transformer's strided, arXiv 1904.10509, sec. 4.3).

    Both parts in one head ("merged", sec. 5.1). One part per head: `by_head` of `sliding_window` and `dilated`.
    """

    @cfg.configclass
    class Config(AttentionPattern.Config):
        stride: int = 64

        def __post_init__(self) -> None:
            at_least_one(self, "stride")

    config: Config

    def rule(self, pairs: Pairs) -> Tensor:
        distance = pairs.query - pairs.key
        return (distance < self.config.stride) | (distance % self.config.stride == 0)


class Fixed(AttentionPattern, variant="fixed"):
    """A token's own block and the `summary` last tokens of every block (Sparse Transformer's fixed, arXiv 1904.10509).

    Those last tokens summarize their block for all later ones.
    """

    @cfg.configclass
    class Config(AttentionPattern.Config):
        block: int = 64
        summary: int = 8

        def __post_init__(self) -> None:
            at_least_one(self, "block", "summary")
            if self.summary > self.block:
                raise ConfigError(f"summary: must be at most block ({self.block}), got {self.summary}")

    config: Config

    def rule(self, pairs: Pairs) -> Tensor:
        block, summary = self.config.block, self.config.summary
        same = pairs.query // block == pairs.key // block
        return same | (pairs.key % block >= block - summary)


class BlockSparse(AttentionPattern, variant="block_sparse"):
    """A token's own block and, before it, near, first and random blocks (BigBird, arXiv 2007.14062; causal).

    Random blocks are drawn per block of queries, alike in every head, from the seed: which ones does not depend on the
    length of the sequence.
    """

    @cfg.configclass
    class Config(AttentionPattern.Config):
        block: int = 64
        near: int = 1
        first: int = 1
        random: int = 1
        seed: int = 0

        def __post_init__(self) -> None:
            at_least_one(self, "block")
            at_least_one(self, "near", "first", "random", "seed", least=0)

    config: Config

    def rule(self, pairs: Pairs) -> Tensor:
        config = self.config
        query, key = pairs.query // config.block, pairs.key // config.block
        seen = (query - key <= config.near) | (key < config.first)
        for draw in range(config.random):
            seen = seen | (key == self._drawn(query, draw))
        return seen

    def _drawn(self, block: Tensor, draw: int) -> Tensor:
        """A block from 0 to `block`: a few rounds of squaring modulo a prime."""
        state = block % PRIME
        for salt in (draw % PRIME, self.config.seed % PRIME, 12_345):
            state = (state * state + state * 7 + salt * 31 + 17) % PRIME
        return state % (block + 1)


class BlockList(AttentionPattern, variant="block_list"):
    """Blocks listed head by head, as pruning by measured attention mass leaves them (Blues' own).

    `heads`: a string for each head, or one for all, as blues/model/attention/pruning.py makes them. It has a
    hexadecimal number for each block of queries, joined by dots; bit j is set if the block's queries see block j of the
    keys. `1.3.5` are three blocks of queries, of which the last does not see the middle block. Queries beyond the last
    listed block see everything before them.
    """

    @cfg.configclass
    class Config(AttentionPattern.Config):
        block: int = 64
        heads: tuple[str, ...] = ("1",)

        def __post_init__(self) -> None:
            at_least_one(self, "block")
            if not self.heads or len({head.count(".") for head in self.heads}) > 1:
                raise ConfigError("heads: must have one string per head, all of equally many blocks")
            for number, head in enumerate(self.heads):
                self._check_head(number, head)

        def _check_head(self, number: int, head: str) -> None:
            for block, digits in enumerate(head.split(".")):
                try:
                    row = int(digits, 16)
                except ValueError:
                    raise ConfigError(f"heads[{number}]: {digits!r} is not a hexadecimal number") from None
                if not row >> block & 1:
                    raise ConfigError(
                        f"heads[{number}]: block {block} hides its tokens from themselves ({digits!r} lacks bit "
                        f"{block}); every query must see its own key"
                    )
                if row >> block + 1:
                    raise ConfigError(f"heads[{number}]: block {block} sees a later block ({digits!r})")

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        rows = [[int(digits, 16) for digits in head.split(".")] for head in config.heads]
        blocks = range(len(rows[0]))
        table = [[[bool(row >> key & 1) for key in blocks] for row in head] for head in rows]
        self._tables: dict[torch.device, Tensor] = {torch.device("cpu"): torch.tensor(table, device="cpu")}

    @property
    def differs_by_head(self) -> bool:
        return len(self.config.heads) > 1

    def table(self, device: torch.device) -> Tensor:
        """`listed_HNN`, bool: head, block of queries, block of keys; H is 1 if there is one list for all heads."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def rule(self, pairs: Pairs) -> Tensor:
        table_HNN = self.table(pairs.query.device)
        last = table_HNN.shape[1] - 1
        query, key = pairs.query // self.config.block, pairs.key // self.config.block
        within = query.clamp(max=last), key.clamp(max=last)
        listed = table_HNN[pairs.head, *within] if self.differs_by_head else table_HNN[0][within]
        return listed | (query > last)

    def check(self, num_heads: int, num_layers: int) -> None:
        if self.differs_by_head and len(self.config.heads) != num_heads:
            raise ConfigError(
                f"attention.pattern: block_list has lists for {len(self.config.heads)} heads, and the layer has "
                f"{num_heads}"
            )
        super().check(num_heads, num_layers)
