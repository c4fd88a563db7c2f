"""Mixture-of-depths: in every block the best tokens alone.

In: the residual stream. Out: the same, in which the tokens that were not chosen passed the block by.

Legend: B batch, T time, C tokens of a row that the block computes, S keys, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.attention.layer import Attention, KVCache, View
from blues.model.attention.masks import positions_within_documents
from blues.model.attention.patterns import AttentionPattern, pairs_of
from blues.model.block import Block, BlockParts
from blues.model.context import Context
from blues.model.depth.base import Chosen, Depth, Passing, nobody, refuse_pools, require_masks
from blues.model.layers import Linear
from blues.model.moe.layer import MoE
from blues.model.moe.routing import Routing, project
from blues.model.rope import Rotation


class MixtureOfDepths(Depth, variant="mixture_of_depths"):
    """Only the tokens of the highest scores go through a block (Mixture-of-Depths, arXiv 2404.02258).

    A token's score is a learned product with its normalized residual stream. In training the block computes the
    `capacity` share of every row with the highest scores, which looks ahead; its output is weighed by the score, so
    that the score learns. Others pass by in the residual stream, and no token sees them in this block: they have no
    key there.

    In evaluation and generation a causal rule stands in its place: the paper's second one, a small network that
    predicts from the token alone (without a gradient to the model) whether it is among the chosen; a token goes through
    iff the network says so. Keys of tokens that do not are masked in the cache.
    """

    @cfg.configclass
    class Config(Depth.Config):
        """layers: a cycle of D (tokens choose) and F (all go through). predictor_weight: of the predictor's loss."""

        capacity: float = 0.125
        layers: str = "DF"
        predictor_weight: float = 0.1

        def __post_init__(self) -> None:
            if not 0 < self.capacity <= 1:
                raise ConfigError(f"capacity: must be above 0 and at most 1, got {self.capacity}")
            if set(self.layers) - {"D", "F"} or "D" not in self.layers:
                raise ConfigError(f"layers: must be a cycle of D and F with a D in it, e.g. DF, got {self.layers!r}")
            if self.predictor_weight <= 0:
                raise ConfigError(f"predictor_weight: must be positive, got {self.predictor_weight}")

    config: Config
    needs_whole = "compares all tokens of a sequence"

    def share(self, layer: int) -> float:
        return self.config.capacity if self.chooses(layer) else 1.0

    def chooses(self, layer: int) -> bool:
        """Whether tokens may pass this layer by."""
        return self.config.layers[layer % len(self.config.layers)] == "D"

    def block(self, **parts: Any) -> BlockParts:
        return DepthBlock(self.config, **parts) if self.chooses(parts["layer"]) else Block(**parts)

    def check(self, attention: Attention.Config, moe: MoE.Config | None) -> None:
        what = "depth: mixture_of_depths"
        chosen = [layer for layer in range(self.num_layers) if self.chooses(layer)]
        if not chosen:
            raise ConfigError(
                f"{what} has layers={self.config.layers}, of which the {self.num_layers} layers reach no D"
            )
        require_masks(what, attention)
        for layer in chosen:
            pattern: AttentionPattern = attention.for_layer(layer).pattern.build()
            if pattern.is_soft or pattern.needs_tree:
                raise ConfigError(
                    f"{what} leaves keys out, and attention.pattern={attention.pattern._variant} of layer {layer} "
                    "needs all of them; choose another pattern or other depth.layers"
                )
        refuse_pools(what, moe, chosen, "depth.layers")


class DepthBlock(BlockParts):
    """A block with a choice, see `MixtureOfDepths`."""

    def __init__(self, config: MixtureOfDepths.Config, **parts: Any) -> None:
        super().__init__(**parts)
        self.depth = config
        dim, std, generator = parts["dim"], parts["std"], parts["generator"]
        self.score = Linear(dim, 1, std=std, generator=generator)
        hidden = max(1, dim // 4)
        self.predictor = nn.Sequential(
            Linear(dim, hidden, std=std, generator=generator),
            nn.SiLU(),
            Linear(hidden, 1, std=std, generator=generator),
        )

    def forward(
        self, x_BTD: Tensor, view: View, context: Context, cache: KVCache | None = None
    ) -> tuple[Tensor, Routing | None, Passing]:
        """(B, T, D) -> (B, T, D), the routing of a mixture (without experts for tokens that passed by), the rest."""
        B, T, D = x_BTD.shape
        normed_BTD = F.rms_norm(x_BTD, (D,))
        predicted_BT = self.predictor(normed_BTD.detach())[..., 0].float()
        score_BT = project(normed_BTD.flatten(0, 1), self.score.weight).view(B, T)
        penalty = None
        if self.training:
            C = max(1, math.ceil(round(self.depth.capacity * T, 6)))
            index_BC = score_BT.detach().topk(C, dim=1).indices.sort(dim=1, stable=True).values
            valid_BC = None
            chosen_BT = torch.zeros_like(predicted_BT).scatter(1, index_BC, 1)
            penalty = self.depth.predictor_weight * F.binary_cross_entropy_with_logits(predicted_BT, chosen_BT)
        else:
            keep_BT = predicted_BT > 0
            C = int(keep_BT.sum(dim=1).max())
            index_BC = (~keep_BT).int().sort(dim=1, stable=True).indices[:, :C]
            valid_BC = keep_BT.gather(1, index_BC)
        seen_BS = None if cache is None else self._seen(keep_BT, context)
        if C == 0:
            return x_BTD, nobody(self.feed_forward, x_BTD), Passing(0, penalty)
        chosen = Chosen(index_BC, valid_BC, T)
        sub_view = narrowed(view, chosen, seen_BS, self.attention.pattern, context, self.attention.config.num_heads)
        x_BCD = chosen.gather(x_BTD)
        held = None if cache is None else _SpreadCache(cache, chosen)
        added_BCD = self.attention(self.attention_norm(x_BCD), sub_view, held, self.layer)
        y_BCD, routing = self.feed(x_BCD + added_BCD, chosen.context(context))
        added_BCD = (added_BCD + y_BCD) * chosen.gather(score_BT[..., None]).to(x_BTD.dtype)
        if valid_BC is not None:
            added_BCD = added_BCD * valid_BC[..., None]
        x_BTD = x_BTD.scatter_add(1, index_BC[..., None].expand(-1, -1, D), added_BCD.to(x_BTD.dtype))
        if routing is not None:
            assert isinstance(self.feed_forward, MoE)
            routing = chosen.spread(routing, self.feed_forward.router.num_experts)
        return x_BTD, routing, Passing(B * C, penalty)

    def _seen(self, keep_BT: Tensor, context: Context) -> Tensor:
        """`seen_BS`: which tokens so far, the new ones included, have a key in this block."""
        past = context.past
        if past is None or past.history is None:
            raise ValueError("mixture_of_depths needs a cache with a history, such as blues.inference.cache.Cache")
        slots_BT = past.slots_BT.expand(keep_BT.shape)
        return past.history.keep(self, keep_BT[..., None], slots_BT)[..., 0]


class _SpreadCache:
    """A KV cache to which the chosen tokens give their keys and values, at their own slots."""

    def __init__(self, cache: KVCache, chosen: Chosen) -> None:
        self.cache, self.chosen = cache, chosen

    @property
    def length(self) -> int:
        return self.cache.length

    def update(self, layer: int, k_BTGC: Tensor, v_BTGC: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.update`, of the chosen tokens; slots of the others hold zeros, which nobody sees."""
        whole = [self.chosen.fill(x.flatten(2), 0).unflatten(2, x.shape[2:]) for x in (k_BTGC, v_BTGC)]
        return self.cache.update(layer, *whole)


def narrowed(
    view: View, chosen: Chosen, seen_BS: Tensor | None, pattern: AttentionPattern, context: Context, num_heads: int
) -> View:
    """The view of the chosen tokens as queries.

    Args:
        seen_BS: keys are all tokens of the cache, of which these are seen; None: keys are the chosen tokens.
    """
    assert view.query_positions_BT is not None and view.key_positions_BS is not None
    turned = None
    if view.query_rotation is not None:
        turned = Rotation(*(chosen.gather(table_BTP) for table_BTP in view.query_rotation))
    positions_BT, documents_BT = view.query_positions_BT, context.documents_BT
    alone = View(turned, turned if seen_BS is None else view.key_rotation, None, False)
    if seen_BS is None and documents_BT is None and pattern.plain_causal:
        # In the order of the row, so that places that only fill up a row come behind all that count.
        return alone._replace(is_causal=True) if chosen.index_BC.shape[1] > 1 else alone
    if documents_BT is not None:
        positions_BT = positions_within_documents(positions_BT, documents_BT)
    queries_BC = chosen.numbers(positions_BT)
    pairs = pairs_of(
        queries_BC,
        queries_BC if seen_BS is None else view.key_positions_BS,
        num_heads,
        documents_BT=None if documents_BT is None else chosen.numbers(documents_BT),
    )
    mask_BHTS = pattern.element(pairs)
    seen_BS = chosen.valid_BC if seen_BS is None else seen_BS
    if seen_BS is not None:
        mask_BHTS = mask_BHTS & seen_BS[:, None, None]
    return alone._replace(mask_BTS=mask_BHTS[:, 0] if mask_BHTS.shape[1] == 1 else mask_BHTS)
