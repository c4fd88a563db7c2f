"""The family of choices of depth: which tokens go through which blocks.

In: the residual stream, as for any block. Out: the residual stream, in which some tokens passed the block by, the
routing of a mixture, and what was computed.

Legend: B batch, T time, C tokens of a row that the block computes, D width, K slots, E experts.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.attention.layer import Attention
from blues.model.block import BlockParts
from blues.model.context import Context
from blues.model.losses import Losses
from blues.model.moe.layer import MoE
from blues.model.moe.routers import DocumentPools
from blues.model.moe.routing import Routing

READ_MASKS = ("auto", "naive", "sdpa", "sdpa_math")
"""Attention backends that take the mask of a selection of tokens."""


class Passing(NamedTuple):
    """What a block with a choice has to say beside its output."""

    block_tokens: int
    """Tokens that it computed, over all rows (places that only fill up a row included)."""
    penalty: Tensor | None
    """A scalar for the loss, already weighted; None in evaluation."""
    exit_BTD: Tensor | None = None
    """The residual stream behind a block that has a loss of its own; None in evaluation."""


class Depth(cfg.Configurable, family="depth"):
    """A family: which tokens go through which blocks."""

    @cfg.configclass
    class Config(cfg.Config):
        pass

    losses: ClassVar[tuple[str, ...]] = ()
    """Fields of `Losses` that it adds in training, to be reported."""
    needs_whole: ClassVar[str]
    """Why a sequence cannot be read in chunks, after "which"."""
    num_exits: int = 0
    """Times that training computes the head beside the last layer's."""

    def __init__(self, config: Config, *, num_layers: int) -> None:
        self.config, self.num_layers = config, num_layers

    @abc.abstractmethod
    def check(self, attention: Attention.Config, moe: MoE.Config | None) -> None:
        """
        Raises:
            ConfigError: the model has something that cannot leave tokens out.
        """

    @abc.abstractmethod
    def share(self, layer: int) -> float:
        """Of the tokens that go through this layer (from 0) in training."""

    @abc.abstractmethod
    def block(self, **parts: Any) -> BlockParts:
        """The block of layer `parts["layer"]`; `parts` as of `Block`."""

    def after(self, layer: int, x_BTD: Tensor, context: Context, logits: Callable[[Tensor], Tensor]) -> Context:
        """In evaluation, what the blocks behind `layer` are to know. `logits` is the final norm and the head."""
        return context

    def add_losses(
        self, losses: Losses, passings: Sequence[Passing | None], cross_entropy: Callable[[Tensor], Tensor]
    ) -> Losses:
        """The losses with what the blocks' passings add. `cross_entropy` of an `x_BTD` before the final norm."""
        penalties = [passing.penalty for passing in passings if passing is not None and passing.penalty is not None]
        return losses._replace(total=losses.total + torch.stack(penalties).mean()) if penalties else losses


def require_masks(what: str, attention: Attention.Config) -> None:
    """
    Raises:
        ConfigError: the attention of a selection of tokens cannot be computed.
    """
    if attention.backend not in READ_MASKS:
        raise ConfigError(
            f"{what} needs attention that reads masks, attention.backend={attention.backend} does not; set it to auto"
        )


def refuse_pools(what: str, moe: MoE.Config | None, layers: Sequence[int], setting: str) -> None:
    """
    Raises:
        ConfigError: a mixture among the `layers` that leave tokens out has a router that needs all tokens.
    """
    for layer in layers:
        if moe is not None and (layer + 1) % moe.every == 0 and isinstance(moe.router, DocumentPools.Config):
            raise ConfigError(
                f"{what} leaves tokens of layer {layer} out, and moe.router=document_pools sums over all of a "
                f"document; choose another router or {setting} without mixtures"
            )


def nobody(feed_forward: nn.Module, x_BTD: Tensor) -> Routing | None:
    """The routing of a mixture where no token goes through."""
    if not isinstance(feed_forward, MoE):
        return None
    router, T = feed_forward.router, x_BTD.shape[0] * x_BTD.shape[1]
    ids_TK = torch.full((T, router.top_k), router.num_experts, device=x_BTD.device)
    zeros_TE = torch.zeros(T, router.num_experts, device=x_BTD.device)
    return Routing(torch.zeros_like(ids_TK, dtype=zeros_TE.dtype), ids_TK, zeros_TE, zeros_TE)


class Chosen(NamedTuple):
    """The tokens of a forward that a block computes."""

    index_BC: Tensor
    valid_BC: Tensor | None
    """False at the end of rows that have fewer; None: all are."""
    length: int

    def gather(self, x_BTD: Tensor) -> Tensor:
        """`x_BCD` of the chosen tokens; a batch of 1 stands for any."""
        index_BC = self.index_BC
        return x_BTD.expand(len(index_BC), -1, -1).gather(1, index_BC[..., None].expand(-1, -1, x_BTD.shape[-1]))

    def numbers(self, x_BT: Tensor) -> Tensor:
        """`x_BC`."""
        return self.gather(x_BT[..., None])[..., 0]

    def context(self, context: Context) -> Context:
        """The context of the chosen tokens alone."""
        documents_BT, languages_BT = context.documents_BT, context.languages_BT
        return context._replace(
            tokens_BT=self.numbers(context.tokens_BT),
            documents_BT=None if documents_BT is None else self.numbers(documents_BT),
            languages_BT=None if languages_BT is None else self.numbers(languages_BT),
            past=None,
        )

    def fill(self, x_BCD: Tensor, value: float) -> Tensor:
        """`x_BTD` with `value` for the tokens that are not chosen."""
        B, _, D = x_BCD.shape
        if self.valid_BC is not None:
            x_BCD = x_BCD.masked_fill(~self.valid_BC[..., None], value)
        return x_BCD.new_full((B, self.length, D), value).scatter(1, self.index_BC[..., None].expand(-1, -1, D), x_BCD)

    def spread(self, routing: Routing, num_experts: int) -> Routing:
        """The routing of all tokens: those that are not chosen go to no expert, have no probabilities, and logits of
        which the z-loss is 0. Losses are so means over all tokens of the row."""

        def over_all(x_TE: Tensor, value: float) -> Tensor:
            return self.fill(x_TE.unflatten(0, (len(self.index_BC), -1)), value).flatten(0, 1)

        return routing._replace(
            weights_TK=over_all(routing.weights_TK, 0),
            ids_TK=over_all(routing.ids_TK, num_experts),
            probs_TE=over_all(routing.probs_TE, 0),
            logits_TE=over_all(routing.logits_TE, -math.log(num_experts)),
            decided=None if routing.decided is None else self.spread(routing.decided, num_experts),
        )
