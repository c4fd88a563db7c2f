"""Which keys a query may see.

In: the positions of queries and keys. Out: a boolean mask, True where the query may see the key.

Legend: B batch (or 1), T queries, S keys.
"""

from __future__ import annotations

import abc
from typing import ClassVar

from torch import Tensor

from blues import config as cfg


class AttentionPattern(cfg.Configurable, family="attention_pattern"):
    """A family of rules on positions. Every query must see at least the key at its own position."""

    @cfg.configclass
    class Config(cfg.Config):
        pass

    plain_causal: ClassVar[bool] = False
    """True if the rule is nothing but causality, so that kernels may use their built-in causal mask."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @abc.abstractmethod
    def mask(self, query_positions_BT: Tensor, key_positions_BS: Tensor) -> Tensor:
        """`mask_BTS`, bool: True where the query may see the key."""


class Causal(AttentionPattern, variant="causal"):
    """A token sees itself and every token before it."""

    plain_causal = True

    def mask(self, query_positions_BT: Tensor, key_positions_BS: Tensor) -> Tensor:
        return key_positions_BS[:, None, :] <= query_positions_BT[:, :, None]
