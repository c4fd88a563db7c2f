"""A long sequence read chunk by chunk, with gradients: what one chunk leaves to the next are keys and values.

In: a model and whole rows of tokens. Out: the hidden states and routing of one whole forward, to the last rounding.

Each chunk is a checkpoint: its forward keeps the keys and values of its layers and its last hidden states, all else is
computed again when the gradient comes to it, last chunk first, and the gradients of carried keys and values add up on
the way (FPDT, arXiv 2408.16978; ChunkFlow, arXiv 2503.02356). Activations are so those of one chunk; what grows with
the length are 2 * G * C numbers per token and layer, one hidden state per token, and the routing.

Everything that a loss reads (routing, hidden states) is put together for the whole sequence first: balancing losses of
every scope and router statistics are those of the whole forward. What decides about tokens by other tokens of the same
forward has no meaning in a chunk and is refused (`check`). Noise of routers is drawn chunk by chunk.

Legend: B rows, T tokens of the sequence, c tokens of a chunk, S tokens up to the end of the chunk, D width, G KV heads,
C channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from blues.errors import ConfigError
from blues.model.attention.layer import View, make_views
from blues.model.attention.masks import positions_within_documents
from blues.model.attention.patterns import AttentionPattern, pairs_of
from blues.model.block import Block
from blues.model.context import Context
from blues.model.moe.layer import MoE
from blues.model.moe.routers import DocumentPools, ExpertChoice, ReLURouter
from blues.model.moe.routing import Routing
from blues.model.moe.rules import CapacityByPosition, CapacityByWeight, ExpertDropout
from blues.model.rope import Rotation

if TYPE_CHECKING:
    from blues.model.transformer import Transformer

WHOLE_ROUTERS = {
    ExpertChoice.Config: "lets each expert choose among all tokens of a forward",
    DocumentPools.Config: "sums over all of a document",
    ReLURouter.Config: "has a penalty on the mean load and the mean gates of all tokens together",
}
"""Routers that decide about tokens by other tokens of the forward, and what they do."""
WHOLE_RULES = {
    CapacityByPosition.Config: "counts all tokens of a forward",
    CapacityByWeight.Config: "orders all tokens of a forward",
    ExpertDropout.Config: "draws once for all tokens of a forward",
}


def refuse_whole(what: str, moe: MoE.Config | None) -> None:
    """Refuse mixtures that need all tokens of a sequence in one place.

    Raises:
        ConfigError: naming `what` cannot go with them, and why.
    """
    if moe is None:
        return
    for kind, does in WHOLE_ROUTERS.items():
        if isinstance(moe.router, kind):
            raise ConfigError(f"{what} cannot go with moe.router={moe.router._variant}, which {does}; set one of them")
    for rule in moe.rules:
        for rule_kind, does in WHOLE_RULES.items():
            if isinstance(rule, rule_kind):
                raise ConfigError(f"{what} cannot go with the rule {rule._variant} of moe.rules, which {does}")


def check(config: Transformer.Config) -> None:
    """
    Raises:
        ConfigError: the model is to be read in chunks and has something that needs the whole sequence at once.
    """
    if config.sequence_chunk is None:
        return
    if config.sequence_chunk < 1:
        raise ConfigError(
            f"sequence_chunk: must be at least 1, or null for whole sequences, got {config.sequence_chunk}"
        )
    if config.activation_offload:
        raise ConfigError(
            "activation_offload cannot go with sequence_chunk, which keeps no activations for the backward; set one "
            "of them"
        )
    refuse_whole("sequence_chunk", config.moe)
    if config.depth is not None:
        does = config.depth.build(num_layers=config.num_layers).needs_whole
        raise ConfigError(f"sequence_chunk cannot go with depth={config.depth._variant}, which {does}; set one of them")
    pattern: AttentionPattern = config.attention.pattern.build()
    if pattern.needs_tree:
        raise ConfigError(
            f"sequence_chunk cannot go with attention.pattern={pattern.config._variant}, which reads a tree of the "
            "whole sequence; choose another pattern"
        )


class Whole(NamedTuple):
    """What a forward over whole rows is given."""

    tokens_BT: Tensor
    documents_BT: Tensor | None
    languages_BT: Tensor | None
    progress: float


Pair = tuple[Tensor, Tensor]
"""One layer's keys and values of one chunk, `k_BcGC, v_BcGC`."""


class Carried:
    """The keys and values that one layer sees of the chunks before; a `KVCache` for one layer and one forward.

    Nothing is written in place, so the gradient of a key goes to the chunk that made it.
    """

    def __init__(self, earlier: Sequence[Pair], length: int) -> None:
        """`earlier`: of the chunks before, in order, `length` tokens together."""
        self._earlier, self._length = earlier, length
        self.own: Pair | None = None

    @property
    def length(self) -> int:
        """Tokens of the chunks before."""
        return self._length

    def update(self, layer: int, k_BTGC: Tensor, v_BTGC: Tensor) -> Pair:
        """As `KVCache.update`."""
        self.own = k_BTGC, v_BTGC
        if not self._earlier:
            return self.own
        pieces = [*self._earlier, self.own]
        return torch.cat([k for k, _ in pieces], dim=1), torch.cat([v for _, v in pieces], dim=1)


def read_in_chunks(
    model: Transformer, whole: Whole, chunk: int, context_fn: Callable[[], tuple[Any, Any]]
) -> tuple[Tensor, tuple[Routing, ...]]:
    """`x_BTD` after the final norm and the routing of every mixture layer, as `Transformer.hidden` of the whole rows.

    Args:
        chunk: tokens per chunk; the last may be shorter.
        context_fn: as of `torch.utils.checkpoint.checkpoint`, for every chunk and every block recomputed in it.
    """
    length = whole.tokens_BT.shape[1]
    within_BT = None
    if whole.documents_BT is not None:
        positions_1T = torch.arange(length, device=whole.tokens_BT.device)[None]
        within_BT = positions_within_documents(positions_1T, whole.documents_BT)
    recompute = model.training and torch.is_grad_enabled()
    hidden: list[Tensor] = []
    routings: list[tuple[Routing, ...]] = []
    earlier: list[tuple[Pair, ...]] = []
    for start in range(0, length, chunk):
        reader = _Chunk(model, whole, within_BT, start, min(start + chunk, length), tuple(earlier), context_fn)
        if recompute:
            x_BcD, routing, pairs = checkpoint(reader, use_reentrant=False, context_fn=context_fn)
        else:
            x_BcD, routing, pairs = reader()
        hidden.append(x_BcD)
        routings.append(routing)
        earlier.append(pairs)
    rows = len(whole.tokens_BT)
    layers = [_join(pieces, rows) for pieces in zip(*routings, strict=True)]
    return torch.cat(hidden, dim=1), tuple(layers)


class _Chunk(NamedTuple):
    """The forward of one chunk; called again for its backward."""

    model: Transformer
    whole: Whole
    within_BT: Tensor | None
    """Positions within documents, of the whole rows."""
    start: int
    end: int
    earlier: tuple[tuple[Pair, ...], ...]
    """By chunk and layer. Its own are returned, not kept here: a graph that held what holds it would never be freed."""
    context_fn: Callable[[], tuple[Any, Any]]

    def __call__(self) -> tuple[Tensor, tuple[Routing, ...], tuple[Pair, ...]]:
        model, (tokens_BT, documents_BT, languages_BT, progress) = self.model, self.whole
        part = slice(self.start, self.end)
        context = Context(
            tokens_BT[:, part],
            None if documents_BT is None else documents_BT[:, part],
            None if languages_BT is None else languages_BT[:, part],
            progress,
        )
        x_BcD = model.embedding(context.tokens_BT)
        routings: list[Routing] = []
        own: list[Pair] = []
        by_block = model.config.gradient_checkpointing and model.training and torch.is_grad_enabled()
        views: Sequence[View | None] = [None] * len(model.blocks) if by_block else self.views(range(len(model.blocks)))
        for layer, view in enumerate(views):
            if by_block:
                x_BcD, routing, pair = checkpoint(
                    self.block, layer, x_BcD, context, use_reentrant=False, context_fn=self.context_fn
                )
            else:
                x_BcD, routing, pair = self.block(layer, x_BcD, context, view)
            own.append(pair)
            if routing is not None:
                routings.append(routing)
        return model.norm(x_BcD), tuple(routings), tuple(own)

    def block(
        self, layer: int, x_BcD: Tensor, context: Context, view: View | None = None
    ) -> tuple[Tensor, Routing | None, Pair]:
        """One block, and the keys and values it adds. Without a view it makes its own: a checkpoint keeps what it is
        called with, and views of all chunks would be quadratic in the length."""
        if view is None:
            (view,) = self.views([layer])
        carried = Carried([chunk[layer] for chunk in self.earlier], self.start)
        x_BcD, routing = cast(Block, self.model.blocks[layer])(x_BcD, view, context, carried)
        assert carried.own is not None
        return x_BcD, routing, carried.own

    def views(self, numbers: Sequence[int]) -> list[View]:
        """One for each of these layers. Rotations are those of the whole length, which some ropes go by."""
        model, device, length = self.model, self.whole.tokens_BT.device, self.whole.tokens_BT.shape[1]
        attention, layers = model.config.attention, [model.attentions[number] for number in numbers]
        patterns = [layer.pattern for layer in layers]
        if self.within_BT is None:
            views = make_views(
                [(None, pattern) for pattern in patterns],
                length=self.end - self.start,
                device=device,
                past=self.start,
                num_heads=attention.num_heads,
                block_masks=model.block_masks if attention.reads_block_masks(device) else None,
            )
        else:
            sights = {pattern: self._documents_view(pattern, attention.num_heads) for pattern in set(patterns)}
            views = [sights[pattern] for pattern in patterns]
        positions_1S = torch.arange(self.end, device=device)[None]
        rotations: tuple[Rotation | None, Rotation | None] = None, None
        if any(layer.rotates for layer in layers):
            rotations = model.rope(positions_1S[:, self.start :], length), model.rope(positions_1S, length)
        return [
            view._replace(query_rotation=rotations[0], key_rotation=rotations[1]) if layer.rotates else view
            for view, layer in zip(views, layers, strict=True)
        ]

    def _documents_view(self, pattern: AttentionPattern, num_heads: int) -> View:
        documents_BT, within_BT = self.whole.documents_BT, self.within_BT
        assert documents_BT is not None and within_BT is not None
        queries_BT, keys_BS = within_BT[:, self.start : self.end], within_BT[:, : self.end]
        pairs = pairs_of(queries_BT, keys_BS, num_heads)._replace(
            query_document=documents_BT[:, None, self.start : self.end, None],
            key_document=documents_BT[:, None, None, : self.end],
        )
        mask_BHTS = pattern.element(pairs)
        mask_BTS = mask_BHTS[:, 0] if mask_BHTS.shape[1] == 1 else mask_BHTS
        return View(None, None, mask_BTS, False, query_positions_BT=queries_BT, key_positions_BS=keys_BS)


def _join(pieces: Sequence[Routing], rows: int) -> Routing:
    """One layer's routing of the whole rows from those of their chunks."""

    def along_time(name: str) -> Tensor:
        return torch.cat([getattr(piece, name).unflatten(0, (rows, -1)) for piece in pieces], dim=1).flatten(0, 1)

    first = pieces[0]
    decided = [piece.decided for piece in pieces if piece.decided is not None]
    pairs = [piece.pairs_P for piece in pieces if piece.pairs_P is not None]
    return Routing(
        along_time("weights_TK"),
        along_time("ids_TK"),
        along_time("probs_TE"),
        along_time("logits_TE"),
        penalty=first.penalty,  # None: `check` refuses routers that have one
        decided=_join(decided, rows) if decided else None,
        pairs_P=torch.stack(pairs).sum(dim=0) if pairs else None,
    )
