"""Sequences that several workers share: each holds a slice of the tokens, attention sees all of them.

In: a model, `Ranks` whose workers form groups, whole batches. Out: each worker's slice of a batch, and a model that
reads such slices as one whole sequence, forward and backward.

Everything but attention works token by token. There, queries change places by an all-to-all: a worker gives away the
other workers' heads of its tokens and gets its own heads of all tokens (DeepSpeed Ulysses, arXiv 2309.14509). The one
KV head is gathered along the sequence instead, as every worker's heads need all of it: per token 2 * C numbers, against
the H * C of the queries. Attention so runs on whole sequences with H / size heads, and documents, windows and block
masks are those of a single worker; rotations are done before, on the slice, at the positions in the whole.

Losses are means over all workers. The cross-entropy is a sum over the worker's targets divided by the same number on
all (`num_targets`); the probabilities of load balancing are means over equally many tokens, and its counts, which
multiply them, are added up over the group (`sum_counts`).

Legend: B batch, T tokens of the whole sequence, t tokens of a worker's slice, W workers of a group, H query heads,
h heads of a worker, C channels of a head, P channel pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from blues.data.mixture.batches import Batch
from blues.errors import ConfigError
from blues.kernels.attention import Sight
from blues.kernels.precision import at_least_float32
from blues.model.attention.backends import Attend
from blues.model.attention.layer import View, make_views
from blues.model.attention.masks import BlockMasks
from blues.model.attention.patterns import AttentionPattern, TokenTree
from blues.model.chunking import refuse_whole
from blues.model.moe.routers import ExpertThreshold
from blues.model.moe.rules import SkipLight
from blues.model.rope import RotaryEmbedding, Rotation
from blues.model.transformer import Transformer
from blues.training.curriculum import Stage
from blues.training.parallel import Ranks

SIZE = "training.parallel.sequence_parallel_size"


def check(size: int, model: Transformer.Config, *, sequence_length: int, stages: Sequence[Stage] = ()) -> None:
    """
    Raises:
        ConfigError: sequences cannot be shared by `size` workers: they are not divisible, or something in the model
            looks at all tokens of a sequence outside attention. Says why.
    """
    if size == 1:
        return
    what, attention, moe = f"{SIZE}={size}", model.attention, model.moe
    lengths = [("data.sequence_length", sequence_length)]
    lengths += [(f"training.context[{number}].length", stage.length) for number, stage in enumerate(stages)]
    for name, length in lengths:
        if length % size:
            raise ConfigError(f"{name}={length} is not a multiple of {what}, which cuts it into equal slices")
    if attention.num_heads % size:
        raise ConfigError(
            f"model.attention.num_heads={attention.num_heads} is not a multiple of {what}, which gives every worker "
            "equally many heads"
        )
    if attention.num_kv_heads > 1:
        raise ConfigError(
            f"{what} replicates the one KV head of multi-query attention, and model.attention.num_kv_heads is "
            f"{attention.num_kv_heads}; set it to 1"
        )
    pattern: AttentionPattern = attention.pattern.build()
    for refused, why in (
        (pattern.is_soft, "learns a span for each head, and a worker has the gradients of its own heads alone"),
        (pattern.differs_by_head, "differs by head, and every worker has one mask for all of its heads"),
        (pattern.needs_tree, "reads a tree of the whole sequence, which does not come with a slice"),
    ):
        if refused:
            raise ConfigError(f"{what} cannot go with model.attention.pattern={pattern.config._variant}, which {why}")
    if model.sequence_chunk is not None:
        raise ConfigError(f"{what} cannot go with model.sequence_chunk, which cuts sequences too; set it to null")
    if model.depth is not None:
        raise ConfigError(
            f"{what} cannot go with model.depth={model.depth._variant}: tokens that pass by attention are not equally "
            "many in every slice; set it to null"
        )
    refuse_whole(what, moe)
    if moe is None:
        return
    if isinstance(moe.router, ExpertThreshold.Config):
        raise ConfigError(f"{what} cannot go with moe.router=threshold, whose cut-offs are those of whole sequences")
    if any(isinstance(rule, SkipLight.Config) and rule.beta is None for rule in moe.rules):
        raise ConfigError(
            f"{what} cannot go with the rule skip_light of moe.rules with beta=null, the median over whole sequences; "
            "set beta to a number"
        )


class _Exchange(torch.autograd.Function):
    """Piece w of the first dimension (W, ...) goes to worker w, which has it at its sender's place."""

    @staticmethod
    def forward(ctx: Any, x_W: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(x_W, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradients[0], ctx.group), None


class _Gather(torch.autograd.Function):
    """Every worker's tensor on every worker, (W, ...); the gradients that come to its copies are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # A reduce-scatter, but added in float32 and in the order of the workers, whatever the backend.
        parts_W = _exchange(gradients[0], ctx.group)
        return at_least_float32(parts_W).sum(dim=0).to(parts_W.dtype), None


def _exchange(x_W: Tensor, group: dist.ProcessGroup) -> Tensor:
    received_W = torch.empty_like(x_W, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received_W, x_W.contiguous(), group=group)
    return received_W


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    gathered_N = x.new_empty(group.size() * x.numel())
    dist.all_gather_into_tensor(gathered_N, x.contiguous().flatten(), group=group)
    return gathered_N.view(group.size(), *x.shape)


def heads_of_all_tokens(x_BtHC: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All heads of the worker's tokens -> the worker's heads of all tokens, `x_BThC`. Differentiable."""
    x_BtWhC = x_BtHC.unflatten(2, (group.size(), -1))
    x_WBthC: Tensor = _Exchange.apply(x_BtWhC.movedim(2, 0), group)
    return x_WBthC.movedim(0, 1).flatten(1, 2)


def tokens_of_all_heads(x_BThC: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The worker's heads of all tokens -> all heads of the worker's tokens, `x_BtHC`. Differentiable."""
    x_BWthC = x_BThC.unflatten(1, (group.size(), -1))
    x_WBthC: Tensor = _Exchange.apply(x_BWthC.movedim(1, 0), group)
    return x_WBthC.movedim(0, 2).flatten(2, 3)


def gather_tokens(x_Bt: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, t, ...) of every worker -> (B, T, ...). Differentiable."""
    x_WBt: Tensor = _Gather.apply(x_Bt, group)
    return x_WBt.movedim(0, 1).flatten(1, 2)


class SharedAttend(Attend):
    """The attention of a layer for a slice of the tokens, computed for some heads of the whole sequence."""

    def __init__(self, alone: Attend, group: dist.ProcessGroup) -> None:
        """`alone`: the attention of one worker; its watch over overflows goes on."""
        head_dim, num_heads, num_kv_heads = alone.shape
        super().__init__(
            alone.backend, head_dim=head_dim, num_heads=num_heads // group.size(), num_kv_heads=num_kv_heads
        )
        self.precision, self.group = alone.precision, group

    def __call__(self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, view: Sight) -> Tensor:
        """Queries, keys, values and result of the worker's slice; `view` of the whole sequence."""
        q_BThC = heads_of_all_tokens(q_BTHC, self.group)
        k_BSGC, v_BSGC = gather_tokens(k_BSGC, self.group), gather_tokens(v_BSGC, self.group)
        return tokens_of_all_heads(super().__call__(q_BThC, k_BSGC, v_BSGC, view), self.group)


class SequenceParallel:
    """One worker's part in the sequences of its group; without a group it has all of them.

    A `blues.model.attention.layer.SequenceSplit`.
    """

    def __init__(self, model: Transformer, ranks: Ranks) -> None:
        self.model, self.group = model, ranks.sequence_group
        self._alone = [layer.attend for layer in model.attentions]
        if self.group is not None and model.config.attention.num_heads % self.group.size():
            raise ConfigError(
                f"model.attention.num_heads={model.config.attention.num_heads} is not a multiple of "
                f"{SIZE}={self.group.size()}"
            )

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside, the model reads slices."""
        if self.group is not None:
            self._set(self, [SharedAttend(attend, self.group) for attend in self._alone])
        try:
            yield
        finally:
            self._set(None, self._alone)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside `shared`: the model reads whole sequences again, each worker for itself."""
        split, attends = self.model.split, [layer.attend for layer in self.model.attentions]
        self._set(None, self._alone)
        try:
            yield
        finally:
            self._set(split, attends)

    def _set(self, split: Any, attends: Sequence[Attend]) -> None:
        self.model.split = split
        for layer, attend in zip(self.model.attentions, attends, strict=True):
            layer.attend = attend

    def part(self, batch: Batch) -> Batch:
        """This worker's tokens of the rows."""
        if self.group is None:
            return batch
        here = self._here(batch.inputs.shape[1] // self.group.size())
        return Batch(
            batch.inputs[:, here],
            batch.targets[:, here],
            batch.sources,
            None if batch.documents is None else batch.documents[:, here],
            None if batch.languages is None else batch.languages[:, here],
        )

    def _here(self, length: int) -> slice:
        assert self.group is not None
        return slice(self.group.rank() * length, (self.group.rank() + 1) * length)

    def make_views(
        self,
        layers: Sequence[tuple[RotaryEmbedding | None, AttentionPattern]],
        *,
        length: int,
        device: torch.device,
        past: int | None = None,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        tree: TokenTree | None = None,
        num_heads: int = 1,
        block_masks: BlockMasks | None = None,
    ) -> list[View]:
        """As `blues.model.attention.layer.make_views` of a slice of `length` tokens and their documents: who sees whom
        in the whole sequence, and the rotations of the slice.

        Raises:
            ValueError: a cache, positions or a tree.
        """
        assert self.group is not None
        if past is not None or positions_BT is not None or tree is not None:
            raise ValueError("a sequence that workers share has no cache, no positions of its own and no tree")
        views = make_views(
            layers,
            length=length * self.group.size(),
            device=device,
            documents_BT=None if documents_BT is None else gather_tokens(documents_BT, self.group),
            num_heads=num_heads // self.group.size(),
            block_masks=block_masks,
        )
        here = self._here(length)
        return [
            view._replace(query_rotation=_cut(view.query_rotation, here), key_rotation=_cut(view.key_rotation, here))
            for view in views
        ]

    def sum_counts(self, counts: Sequence[Tensor]) -> Sequence[Tensor]:
        """The sum over the group of each layer's counts, in one reduction."""
        together_N = torch.cat([layer.flatten() for layer in counts])
        dist.all_reduce(together_N, group=self.group)
        pieces = together_N.split([layer.numel() for layer in counts])
        return [piece.view_as(layer) for piece, layer in zip(pieces, counts, strict=True)]


def _cut(rotation: Rotation | None, here: slice) -> Rotation | None:
    return None if rotation is None else Rotation(rotation.cos_BTP[:, here], rotation.sin_BTP[:, here])
