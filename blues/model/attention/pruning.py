"""Attention that is hardly used, measured and left out: a sparser pattern, and the loss it costs.

In: a model and batches of tokens. Out: how much attention each block of keys gets from each block of queries, head by
head; a pattern that keeps a given share of it, as a configuration that can be written down and trained on; the
validation loss before and after.

    mass = measure_attention(model, calibration, block=64)
    pruned = prune_attention(model, mass, keep=0.99)            # pruned.pattern goes into a configuration
    cost = cost_of_pruning(model, pruned, validation)           # nats per token before and after

The layers run on the naive definition while they are measured, so T x T scores of one layer at a time are in memory.

Legend: L layers, B rows, T tokens, H query heads, N blocks of a sequence, C channels of a head, G KV heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from blues.errors import ConfigError
from blues.kernels.attention import Sight, dense_mask
from blues.kernels.precision import at_least_float32
from blues.model.attention.backends import Attend
from blues.model.attention.layer import Attention
from blues.model.attention.patterns import AllOf, AttentionPattern, BlockList, ByLayer, Causal
from blues.model.transformer import Transformer


@dataclass(frozen=True)
class AttentionMass:
    """Attention in the mean over measured queries."""

    block: int
    """Tokens of a block."""
    mass_LHNN: Tensor
    """Layer, head, block of queries, block of keys (float64): the share of their attention that the block's queries
    give to the block's keys; sums to 1 over keys."""
    entropy_LH: Tensor
    """Nats: exp of it is the number of keys that a head really reads (see `entropy_windows`)."""
    visible_LHNN: Tensor
    """bool: blocks in which a query may see a key at all."""
    tokens: int


@dataclass(frozen=True)
class AttentionPruning:
    """A sparser pattern and what it leaves out."""

    pattern: AttentionPattern.Config
    kept_LH: Tensor
    """Blocks that stay, of each layer's heads."""
    visible_LH: Tensor
    """Blocks that could be seen before."""
    mass_LH: Tensor
    """Share of the measured attention that the blocks which stay have, in the mean over blocks of queries."""

    @property
    def blocks_saved(self) -> float:
        """Share of the blocks seen before that are left out."""
        return 1 - float(self.kept_LH.sum() / self.visible_LH.sum())

    def __str__(self) -> str:
        return (
            f"{int(self.kept_LH.sum()):,} of {int(self.visible_LH.sum()):,} blocks of attention stay "
            f"({self.blocks_saved:.1%} saved), which have {float(self.mass_LH.mean()):.2%} of the measured attention "
            f"(the least in a head: {float(self.mass_LH.min()):.2%})"
        )


@dataclass(frozen=True)
class PruningCost:
    """Validation cross-entropy in nats per token, with the old pattern and with the new one."""

    before: float
    after: float

    def __str__(self) -> str:
        return f"validation loss {self.before:.4f} before, {self.after:.4f} after ({self.after - self.before:+.4f})"


@torch.no_grad()
def measure_attention(model: Transformer, batches: Iterable[Tensor], *, block: int = 64) -> AttentionMass:
    """Where the model's attention goes.

    Args:
        batches: `tokens_BT`, all of the length for which the pattern is made. Rows are taken for one document each.
        block: tokens of a block; 128 is that of FlexAttention's kernels.

    Raises:
        ConfigError: no tokens, rows of several lengths, or a pattern that follows a tree.
    """
    if model.pattern.needs_tree:
        raise ConfigError("attention.pattern: prefix_syntax depends on the text, so no list of blocks can replace it")
    if block < 1:
        raise ConfigError(f"block: must be at least 1, got {block}")
    observers, length, rows = [Observer(layer.attend, block) for layer in model.attentions], None, 0
    was_training = model.training
    model.eval()
    try:
        with observed(model.attentions, observers):
            for tokens_BT in batches:
                if length not in (None, tokens_BT.shape[1]):
                    raise ConfigError(
                        f"calibration: rows have {length} and {tokens_BT.shape[1]} tokens; give rows of one length"
                    )
                length, rows = tokens_BT.shape[1], rows + len(tokens_BT)
                model.hidden(tokens_BT)
    finally:
        model.train(was_training)
    if length is None or rows == 0:
        raise ConfigError("calibration: no tokens to measure attention on")
    return AttentionMass(
        block=block,
        mass_LHNN=torch.stack([observer.mass() for observer in observers]).cpu(),
        entropy_LH=torch.stack([observer.entropy() for observer in observers]).cpu(),
        visible_LHNN=torch.stack([observer.visible() for observer in observers]).cpu(),
        tokens=rows * length,
    )


class Observer:
    """Takes the place of a layer's attention: computes it as it is defined, and adds up where it went."""

    def __init__(self, attend: Attend, block: int) -> None:
        self.block, self.precision = block, attend.precision
        self._mass_HTN = self._seen_HTN = self._entropy_HT = torch.zeros(())
        self._rows = 0

    def __call__(self, q_BTHC: Tensor, k_BTGC: Tensor, v_BTGC: Tensor, view: Sight) -> Tensor:
        """`out_BTHC`; arguments as those of any attention, without a cache."""
        probs_BHTS = attention_probabilities(q_BTHC, k_BTGC, view)
        pad = -probs_BHTS.shape[-1] % self.block
        blocks_BHTN = torch.nn.functional.pad(probs_BHTS, (0, pad)).unflatten(-1, (-1, self.block))
        self._mass_HTN = self._mass_HTN + blocks_BHTN.sum(dim=-1).sum(dim=0, dtype=torch.float64)
        self._seen_HTN = self._seen_HTN + (blocks_BHTN > 0).any(dim=-1).sum(dim=0)
        self._entropy_HT = self._entropy_HT + torch.special.entr(probs_BHTS).sum(dim=-1).sum(dim=0, dtype=torch.float64)
        self._rows += len(probs_BHTS)
        share = q_BTHC.shape[2] // v_BTGC.shape[2]
        return torch.einsum("bhts,bshc->bthc", probs_BHTS.to(v_BTGC.dtype), v_BTGC.repeat_interleave(share, dim=2))

    def mass(self) -> Tensor:
        """`mass_HNN`, see `AttentionMass`."""
        return self._over_query_blocks(self._mass_HTN / self._rows)

    def visible(self) -> Tensor:
        """`visible_HNN`."""
        return self._over_query_blocks(self._seen_HTN.double()) > 0

    def entropy(self) -> Tensor:
        """`entropy_H`."""
        return self._entropy_HT.mean(dim=-1) / self._rows

    def _over_query_blocks(self, x_HTN: Tensor) -> Tensor:
        return torch.stack([part.mean(dim=1) for part in x_HTN.split(self.block, dim=1)], dim=1)


def attention_probabilities(q_BTHC: Tensor, k_BSGC: Tensor, view: Sight) -> Tensor:
    """`probs_BHTS` in float32 or better, as `blues.kernels.attention.naive` defines them."""
    T, S, share = q_BTHC.shape[1], k_BSGC.shape[1], q_BTHC.shape[2] // k_BSGC.shape[2]
    k_BSHC = k_BSGC.repeat_interleave(share, dim=2)
    scores_BHTS = at_least_float32(torch.einsum("bthc,bshc->bhts", q_BTHC, k_BSHC)) * q_BTHC.shape[-1] ** -0.5
    mask_BHTS = dense_mask(view, T, S, q_BTHC.device)
    if mask_BHTS is not None and mask_BHTS.is_floating_point():
        scores_BHTS = scores_BHTS + mask_BHTS
    elif mask_BHTS is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask_BHTS, -torch.inf)
    return scores_BHTS.softmax(dim=-1)


@contextmanager
def observed(layers: list[Attention], observers: list[Observer]) -> Iterator[None]:
    """Lets each observer compute its layer's attention inside the block."""
    attends = [layer.attend for layer in layers]
    try:
        for layer, observer in zip(layers, observers, strict=True):
            layer.attend = observer  # type: ignore[assignment]
        yield
    finally:
        for layer, attend in zip(layers, attends, strict=True):
            layer.attend = attend


def prune_attention(model: Transformer, mass: AttentionMass, *, keep: float = 0.99) -> AttentionPruning:
    """The model's pattern without the blocks that hardly anyone reads.

    For each head and block of queries the blocks of keys with most mass stay until they have `keep` of it, and always
    the queries' own block.

    Raises:
        ConfigError: `keep` is no share of 1; a layer with learned spans, which weighs keys and lists none.
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"keep: must be above 0 and at most 1, got {keep}")
    if model.pattern.is_soft:
        raise ConfigError("attention.pattern: adaptive_window weighs keys, so no list of blocks can replace it")
    kept_LHNN = blocks_to_keep(mass.mass_LHNN, keep) & mass.visible_LHNN
    layers = []
    for layer, kept_HNN in zip(model.attentions, kept_LHNN, strict=True):
        listed = block_list(kept_HNN, mass.block)
        old = layer.pattern.config
        layers.append(listed if isinstance(old, Causal.Config) else AllOf.Config(patterns=(old, listed)))
    return AttentionPruning(
        pattern=layers[0] if len(set(layers)) == 1 else ByLayer.Config(patterns=tuple(layers)),
        kept_LH=kept_LHNN.sum(dim=(2, 3)),
        visible_LH=mass.visible_LHNN.sum(dim=(2, 3)),
        mass_LH=(mass.mass_LHNN * kept_LHNN).sum(dim=3).mean(dim=2),
    )


def blocks_to_keep(mass_LHNN: Tensor, keep: float) -> Tensor:
    """`kept_LHNN`, bool: the fewest blocks of keys that have `keep` of each row's mass, and the diagonal."""
    sorted_LHNN, order_LHNN = mass_LHNN.sort(dim=-1, descending=True, stable=True)
    before_LHNN = sorted_LHNN.cumsum(dim=-1) - sorted_LHNN
    enough = keep * mass_LHNN.sum(dim=-1, keepdim=True)
    kept_LHNN = torch.zeros_like(mass_LHNN, dtype=torch.bool).scatter(-1, order_LHNN, before_LHNN < enough)
    own_NN = torch.eye(mass_LHNN.shape[-1], dtype=torch.bool, device=mass_LHNN.device)
    return (kept_LHNN & (mass_LHNN > 0)) | own_NN


def block_list(kept_HNN: Tensor, block: int) -> BlockList.Config:
    """The blocks as a pattern; one list where all heads have the same."""
    heads = [
        ".".join(f"{sum(1 << key for key, seen in enumerate(row) if seen):x}" for row in head)
        for head in kept_HNN.tolist()
    ]
    return BlockList.Config(block=block, heads=tuple(heads if len(set(heads)) > 1 else heads[:1]))


def with_pattern(model: Transformer, pattern: AttentionPattern.Config) -> Transformer:
    """The same weights (shared with `model`) under another pattern.

    Raises:
        ConfigError: the pattern does not fit the model.
    """
    config = model.config.replace(attention=model.config.attention.replace(pattern=pattern))
    with torch.device("meta"):
        other: Transformer = config.build()
    other.load_state_dict(model.state_dict(), assign=True)
    return other.train(model.training)


@torch.no_grad()
def cost_of_pruning(
    model: Transformer, pruning: AttentionPruning, batches: Iterable[tuple[Tensor, Tensor]]
) -> PruningCost:
    """The validation loss before and after, over `(tokens_BT, targets_BT)` batches of equally many targets.

    Raises:
        ConfigError: no batches.
    """
    before, after = model, with_pattern(model, pruning.pattern)
    losses: list[tuple[float, float]] = []
    was_training = model.training
    before.eval()
    after.eval()
    try:
        for tokens_BT, targets_BT in batches:
            old, new = (float(each(tokens_BT, targets_BT).losses.cross_entropy) for each in (before, after))
            losses.append((old, new))
    finally:
        model.train(was_training)
    if not losses:
        raise ConfigError("validation: no batches to measure the cost of pruning on")
    old, new = (sum(column) / len(losses) for column in zip(*losses, strict=True))
    return PruningCost(before=old, after=new)
