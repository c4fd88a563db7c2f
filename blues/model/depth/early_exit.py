"""Early exit: easy tokens leave before the last layer.

In: the residual stream. Out: the same, in which tokens that have left do not change; in training, the residual stream
at each exit, for a loss of its own.

Legend: B batch, T time, N tokens of all rows, C tokens of a row that have not left, S keys, G KV heads, D width,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.attention.layer import Attention, KVCache, View
from blues.model.attention.masks import positions_within_documents
from blues.model.attention.patterns import AttentionPattern, pairs_of
from blues.model.block import Block, BlockParts
from blues.model.context import Context
from blues.model.depth.base import Chosen, Depth, Passing, nobody, refuse_pools, require_masks
from blues.model.losses import Losses
from blues.model.moe.layer import MoE
from blues.model.moe.routing import Routing
from blues.model.rope import Rotation

Confidence = Literal["margin", "probability", "entropy"]
JUDGED_AT_ONCE = 512
"""Tokens whose logits an exit holds together."""


def confidence(logits_NV: Tensor, kind: Confidence) -> Tensor:
    """`confidence_N`, 0 to 1, of the next token: by how much the best one's probability is ahead of the second's
    (CALM's softmax response), the best one's probability, or 1 - entropy / log V."""
    log_probs_NV = logits_NV.log_softmax(dim=-1)
    if kind == "entropy":
        return 1 + (log_probs_NV.exp() * log_probs_NV).sum(dim=-1) / math.log(logits_NV.shape[-1])
    best_N2 = log_probs_NV.topk(2, dim=-1).values.exp()
    return best_N2[:, 0] - best_N2[:, 1] if kind == "margin" else best_N2[:, 0]


class EarlyExit(Depth, variant="early_exit"):
    """A token leaves at the layer that is sure of what follows (CALM, arXiv 2207.07061; LayerSkip, arXiv 2404.16710).

    Training computes every layer, and beside the last one's a cross-entropy at each exit, through the final norm and
    the head that all share; deeper exits count more, as in both papers.

    In evaluation and generation a token whose confidence is above the threshold leaves: its residual stream is what
    the head reads in the end. The layers behind take its keys and values from that same stream (CALM's propagation), so
    that later tokens find all of them; that product, and the head at each exit, are what leaving does not save. Who
    leaves depends on nothing later, so that decoding token by token is the whole forward.
    """

    @cfg.configclass
    class Config(Depth.Config):
        """exits: layers (from 0) after which tokens may leave; empty for one after `every` layers (None: a quarter of
        them). exit_weight: of the mean of the exits' losses. weights: of exits in that mean, by the number l of layers
        so far: linear l (CALM), quadratic l (l + 1) / 2 (LayerSkip). threshold: 1 for never."""

        exits: tuple[int, ...] = ()
        every: int | None = None
        exit_weight: float = 0.3
        weights: Literal["linear", "quadratic"] = "linear"
        confidence: Confidence = "margin"
        threshold: float = 0.9

        def __post_init__(self) -> None:
            if list(self.exits) != sorted(set(self.exits)):
                raise ConfigError(f"exits: must be different layers in rising order, got {list(self.exits)}")
            if self.every is not None and (self.every < 1 or self.exits):
                raise ConfigError(f"every: must be at least 1, and goes without exits, got {self.every}")
            if self.exit_weight <= 0:
                raise ConfigError(f"exit_weight: must be positive, got {self.exit_weight}")
            if not 0 <= self.threshold <= 1:
                raise ConfigError(f"threshold: must be from 0 to 1 (never), got {self.threshold}")

    config: Config
    losses = ("exit_loss",)
    needs_whole = "takes losses from the streams of all tokens between layers"

    def __init__(self, config: Config, *, num_layers: int) -> None:
        super().__init__(config, num_layers=num_layers)
        every = config.every or max(1, num_layers // 4)
        self.exits = config.exits or tuple(range(every - 1, num_layers - 1, every))
        self.num_exits = len(self.exits)

    def share(self, layer: int) -> float:
        return 1.0

    def block(self, **parts: Any) -> BlockParts:
        return ExitBlock(is_exit=parts["layer"] in self.exits, **parts)

    def check(self, attention: Attention.Config, moe: MoE.Config | None) -> None:
        what = "depth: early_exit"
        if not self.exits or self.exits[0] < 0 or self.exits[-1] > self.num_layers - 2:
            asked = f"exits={list(self.exits)}" if self.config.exits else f"every={self.config.every}"
            raise ConfigError(
                f"{what} has {asked}, and must have exits behind layers (from 0) before the last of the "
                f"{self.num_layers}; give layers from 0 to {self.num_layers - 2}"
                if self.num_layers > 1
                else f"{what} needs at least 2 layers (num_layers); after the only one there is nothing to skip"
            )
        require_masks(what, attention)
        behind = range(self.exits[0] + 1, self.num_layers)
        for layer in behind:
            pattern: AttentionPattern = attention.for_layer(layer).pattern.build()
            if pattern.needs_tree:
                raise ConfigError(
                    f"{what} computes attention for a selection of tokens, and attention.pattern="
                    f"{attention.pattern._variant} of layer {layer} reads a tree of all; choose another pattern"
                )
        refuse_pools(what, moe, behind, "depth.exits behind which there are layers")

    def after(self, layer: int, x_BTD: Tensor, context: Context, logits: Callable[[Tensor], Tensor]) -> Context:
        if layer not in self.exits or self.config.threshold == 1:
            return context
        left_BT = context.left_BT
        if left_BT is None:
            left_BT = torch.zeros_like(context.tokens_BT, dtype=torch.bool)
        sure = [
            confidence(logits(part_ND), self.config.confidence) > self.config.threshold
            for part_ND in x_BTD.detach()[~left_BT].split(JUDGED_AT_ONCE)
        ]
        left_BT = left_BT.masked_scatter(~left_BT, torch.cat(sure))
        return context._replace(left_BT=left_BT if bool(left_BT.any()) else None)

    def add_losses(
        self, losses: Losses, passings: Sequence[Passing | None], cross_entropy: Callable[[Tensor], Tensor]
    ) -> Losses:
        hidden = [passing.exit_BTD for passing in passings if passing is not None and passing.exit_BTD is not None]
        if not hidden:
            return losses
        mean = torch.stack([w * cross_entropy(x) for w, x in zip(self.exit_weights(), hidden, strict=True)]).sum()
        return losses._replace(total=losses.total + self.config.exit_weight * mean, exit_loss=mean.detach())

    def exit_weights(self) -> list[float]:
        """Of each exit's loss; they sum to 1."""
        numbers = [layer + 1 for layer in self.exits]
        raw = [n * (n + 1) / 2 if self.config.weights == "quadratic" else n for n in numbers]
        return [weight / sum(raw) for weight in raw]


class ExitBlock(Block):
    """A block for the tokens that have not left, see `EarlyExit`."""

    def __init__(self, *, is_exit: bool, **parts: Any) -> None:
        super().__init__(**parts)
        self.is_exit = is_exit

    def forward(  # type: ignore[override]
        self, x_BTD: Tensor, view: View, context: Context, cache: KVCache | None = None
    ) -> tuple[Tensor, Routing | None, Passing]:
        """(B, T, D) -> (B, T, D), the routing of a mixture (without experts for tokens that have left), the rest."""
        B, T, D = x_BTD.shape
        left_BT = context.left_BT
        if left_BT is None:
            x_BTD, routing = super().forward(x_BTD, view, context, cache)
            return x_BTD, routing, Passing(B * T, None, x_BTD if self.is_exit and self.training else None)
        normed_BTD = self.attention_norm(x_BTD)
        C = T - int(left_BT.sum(dim=1).min())
        if C == 0:
            if cache is not None:
                cache.update(self.layer, *self.attention.keys_and_values(normed_BTD))
            return x_BTD, nobody(self.feed_forward, x_BTD), Passing(0, None)
        index_BC = left_BT.int().sort(dim=1, stable=True).indices[:, :C]
        chosen = Chosen(index_BC, ~left_BT.gather(1, index_BC), T)
        sub_view = asking(view, chosen, self.attention.pattern, context, self.attention.config.num_heads)
        added_BCD = self.attention(chosen.gather(normed_BTD), sub_view, cache, self.layer, keys_BTD=normed_BTD)
        y_BCD, routing = self.feed(chosen.gather(x_BTD) + added_BCD, chosen.context(context))
        x_BTD = x_BTD + chosen.fill(added_BCD + y_BCD, 0)
        if routing is not None:
            assert isinstance(self.feed_forward, MoE)
            routing = chosen.spread(routing, self.feed_forward.router.num_experts)
        return x_BTD, routing, Passing(B * C, None)


def asking(view: View, chosen: Chosen, pattern: AttentionPattern, context: Context, num_heads: int) -> View:
    """The view of the chosen tokens as queries of the keys of all."""
    assert view.query_positions_BT is not None and view.key_positions_BS is not None
    turned = None
    if view.query_rotation is not None:
        turned = Rotation(*(chosen.gather(table_BTP) for table_BTP in view.query_rotation))
    queries_BT, keys_BS, documents_BT = view.query_positions_BT, view.key_positions_BS, context.documents_BT
    if documents_BT is not None:  # there is no cache, so that the keys are the tokens
        queries_BT = keys_BS = positions_within_documents(queries_BT, documents_BT)
    pairs = pairs_of(chosen.numbers(queries_BT), keys_BS, num_heads)
    if documents_BT is not None:
        of_query_BC = chosen.numbers(documents_BT)
        pairs = pairs._replace(query_document=of_query_BC[:, None, :, None], key_document=documents_BT[:, None, None])
    mask_BHTS = pattern.element(pairs)
    return View(
        turned,
        view.key_rotation,
        mask_BHTS[:, 0] if mask_BHTS.shape[1] == 1 else mask_BHTS,
        False,
        query_positions_BT=chosen.numbers(view.query_positions_BT),
        key_positions_BS=view.key_positions_BS,
    )
