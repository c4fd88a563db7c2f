"""The family of attention patterns: one rule on a pair of a query and a key, and the forms that kernels read.

In: positions (and heads, documents, trees). Out: whether a query may see a key.

A rule is written once, with elementwise operations on the fields of `Pairs`. With fields of shape (B, 1, T, 1) and
(B, 1, 1, S) it gives the dense mask, which is the definition; with the scalars that FlexAttention hands to a `mask_mod`
it gives a block mask. Causality is no matter of the rule: no pattern sees the future.

Legend: B batch (or 1), H heads (or 1), T queries, S keys.
"""

from __future__ import annotations

import abc
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.attention.blocks import build_block_mask

SELF_CHECK = 4096
"""Positions from 0 at which `check` looks whether a query sees itself."""


class TokenTree(NamedTuple):
    """The tree that tokens belong to, as Euler intervals: token k is an ancestor of q iff tin[k] <= tin[q] < tout[k].

    Both int64, one entry per slot: every token of the rows so far, those in a cache included. A node that is still open
    has a `tout` above every `tin` to come, so what a query sees is determined by the tokens before it.
    """

    tin_BS: Tensor
    tout_BS: Tensor


class Pairs(NamedTuple):
    """Pairs of a query and a key; all fields broadcast against each other (int64, or int32 inside a kernel)."""

    query: Tensor
    """Position of the query; within its document, where documents are told apart."""
    key: Tensor
    head: Tensor
    """Number of the query head."""
    query_document: Tensor | None = None
    key_document: Tensor | None = None
    query_tin: Tensor | None = None
    key_tin: Tensor | None = None
    key_tout: Tensor | None = None

    def of_queries(self, start: int, end: int) -> Pairs:
        """Of dense pairs, those of the queries start..end-1."""
        document, tin = self.query_document, self.query_tin
        return self._replace(
            query=self.query[:, :, start:end],
            query_document=None if document is None else document[:, :, start:end],
            query_tin=None if tin is None else tin[:, :, start:end],
        )


class AttentionPattern(cfg.Configurable, family="attention_pattern"):
    """A family of rules. Patterns of equal configuration are equal, and hash alike."""

    @cfg.configclass
    class Config(cfg.Config):
        pass

    def __init__(self, config: Config) -> None:
        self.config = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttentionPattern) and self.config == other.config

    def __hash__(self) -> int:
        return hash(self.config)

    @abc.abstractmethod
    def rule(self, pairs: Pairs) -> Tensor:
        """bool, broadcast over `pairs`: whether a query may see a key that is not later. Every query sees itself."""

    def window(self) -> tuple[int, int] | None:
        """(left, right) if the query at position p sees just the keys p - left .. p + right; -1 is no limit."""
        return None

    def for_layer(self, layer: int) -> AttentionPattern:
        """The pattern of this layer (from 0)."""
        return self

    @property
    def children(self) -> tuple[AttentionPattern, ...]:
        """The patterns that this one is made of."""
        return ()

    @property
    def plain_causal(self) -> bool:
        """Whether the rule is nothing but causality, so that kernels may use their built-in causal mask."""
        return self.window() == (-1, 0)

    @property
    def differs_by_head(self) -> bool:
        """Whether heads see different keys."""
        return any(child.differs_by_head for child in self.children)

    @property
    def needs_tree(self) -> bool:
        """Whether the rule reads a `TokenTree`."""
        return any(child.needs_tree for child in self.children)

    @property
    def is_soft(self) -> bool:
        """Whether visible keys are weighted by something learned (see `AdaptiveWindow`)."""
        return any(child.is_soft for child in self.children)

    def element(self, pairs: Pairs) -> Tensor:
        """bool, broadcast over `pairs`: whether a query may see a key."""
        allowed = (pairs.key <= pairs.query) & self.rule(pairs)
        if pairs.query_document is not None and pairs.key_document is not None:
            allowed = allowed & (pairs.query_document == pairs.key_document)
        return allowed

    def mask(self, query_positions_BT: Tensor, key_positions_BS: Tensor, num_heads: int = 1) -> Tensor:
        """`mask_BHTS`, bool; H is `num_heads` where heads differ, else 1. The rule on positions alone."""
        return self.element(pairs_of(query_positions_BT, key_positions_BS, num_heads))

    def block_mask(self, length: int, device: torch.device, num_heads: int = 1) -> BlockMask:
        """FlexAttention's mask of `length` queries on as many keys, from position 0 on."""

        def mask_mod(_b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return self.element(Pairs(q, k, h))

        positions_1T = torch.arange(length, device=device)[None]

        def allowed(start: int, end: int) -> Tensor:
            return self.mask(positions_1T[:, start:end], positions_1T, num_heads)

        return build_block_mask(allowed, mask_mod, length, length)

    def check(self, num_heads: int, num_layers: int) -> None:
        """Refuse what cannot work in a model of so many query heads per layer and so many layers.

        Raises:
            ConfigError: a query that does not see itself, or a pattern made for more heads or layers than there are.
        """
        for child in self.children:
            child.check(num_heads, num_layers)
        layers = {self.for_layer(layer) for layer in range(num_layers)}
        for pattern in layers:
            if not pattern.needs_tree:
                pattern._check_self(num_heads)

    def _check_self(self, num_heads: int) -> None:
        p_1T1 = torch.arange(SELF_CHECK, device="cpu")[None, :, None]
        heads_H11 = torch.arange(num_heads, device="cpu")[:, None, None]
        sees_HT = self.element(Pairs(p_1T1, p_1T1, heads_H11)).expand(num_heads, SELF_CHECK, 1)[..., 0]
        if not bool(sees_HT.all()):
            head, position = (~sees_HT).nonzero()[0].tolist()
            raise ConfigError(
                f"attention.pattern: {self.config._variant} hides the token at position {position} from itself in head "
                f"{head}; every query must see its own key"
            )


def pairs_of(
    query_positions_BT: Tensor,
    key_positions_BS: Tensor,
    num_heads: int = 1,
    *,
    documents_BT: Tensor | None = None,
    tree: TokenTree | None = None,
    query_slots_BT: Tensor | None = None,
) -> Pairs:
    """All pairs, for a dense mask.

    Args:
        documents_BT: numbers of the queries' documents, which are the keys' too (no cache).
        tree: of all keys.
        query_slots_BT: where the queries stand among the keys; by default, the queries are the keys.
    """
    head = torch.arange(num_heads, device=key_positions_BS.device)[None, :, None, None]
    pairs = Pairs(_queries(query_positions_BT), _keys(key_positions_BS), head)
    if documents_BT is not None:
        pairs = pairs._replace(query_document=_queries(documents_BT), key_document=_keys(documents_BT))
    if tree is not None:
        own_BT = tree.tin_BS
        if query_slots_BT is not None:
            own_BT = own_BT.gather(1, query_slots_BT.expand(len(own_BT), -1))
        pairs = pairs._replace(query_tin=_queries(own_BT), key_tin=_keys(tree.tin_BS), key_tout=_keys(tree.tout_BS))
    return pairs


def _queries(x_BT: Tensor) -> Tensor:
    return x_BT[:, None, :, None]


def _keys(x_BS: Tensor) -> Tensor:
    return x_BS[:, None, None, :]


def at_least_one(config: cfg.Config, *names: str, least: int = 1) -> None:
    """Refuse a configuration in which one of these fields (a number or several) is too small.

    Raises:
        ConfigError: naming the field.
    """
    for name in names:
        values = getattr(config, name)
        for value in values if isinstance(values, tuple) else (values,):
            if value < least:
                raise ConfigError(f"{name}: must be at least {least}, got {value}")
