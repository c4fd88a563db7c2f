"""A trained model made ready for a longer context: its rotary embedding, and the checkpoint that training starts from.

In: the configuration of a model, the length that it was trained at, the new length and a method. Out: the
configuration of the same weights at the new length; and in a new run folder a checkpoint of step 0 with these weights,
from which the ordinary trainer goes on as from any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from blues.config import nearest
from blues.errors import ConfigError
from blues.model.rope import (
    BaseChange,
    DynamicNTK,
    LinearInterpolation,
    Llama3,
    LongRoPE,
    NoPE,
    NTKAware,
    PlainRotary,
    PRoPE,
    Resonance,
    RotaryEmbedding,
    YaRN,
    smallest_base,
)
from blues.model.rope.extension import Extended, Scaled
from blues.model.transformer import Transformer
from blues.training.checkpoint import Checkpoint, write_first_checkpoint
from blues.training.optim import Optimizer

NONE = "none"

Rope = RotaryEmbedding.Config
Derive = Callable[[float, int, int, int], Rope]
"""(base, head_dim, original length, new length) -> the rotary embedding of the new length."""


def _scaled(kind: type[Scaled]) -> Derive:
    def derive(theta: float, head_dim: int, original: int, length: int) -> Rope:
        own = {"original_length": original} if issubclass(kind, Extended) else {}
        return kind.Config(theta=theta, factor=length / original, **own)

    return derive


def _dynamic_ntk(theta: float, head_dim: int, original: int, length: int) -> Rope:
    """At factor 1 its base grows by just what the length of the text asks for."""
    return DynamicNTK.Config(theta=theta, factor=1.0, original_length=original)


def _base_change(theta: float, head_dim: int, original: int, length: int) -> Rope:
    """The base times the square of the factor (about that of arXiv 2309.16039: 50 times for 8), and not below the
    bound of arXiv 2405.14591."""
    return BaseChange.Config(theta=max(theta * (length / original) ** 2, smallest_base(length)))


def _p_rope(theta: float, head_dim: int, original: int, length: int) -> Rope:
    """Pairs that never completed a turn within the original length stop: beyond it they would meet new angles."""
    pairs = head_dim // 2
    turned = sum(2 * math.pi * theta ** (2 * pair / head_dim) <= original for pair in range(pairs))
    return PRoPE.Config(theta=theta, fraction=min(1.0, (max(1, turned) + 0.5) / pairs))


def _resonance(theta: float, head_dim: int, original: int, length: int) -> Rope:
    """On top of YaRN, as its paper does."""
    return Resonance.Config(of=_scaled(YaRN)(theta, head_dim, original, length), original_length=original)


METHODS: Mapping[str, Derive] = {
    "yarn": _scaled(YaRN),
    "ntk": _scaled(NTKAware),
    "dynamic_ntk": _dynamic_ntk,
    "linear": _scaled(LinearInterpolation),
    "longrope": _scaled(LongRoPE),
    "llama3": _scaled(Llama3),
    "base_change": _base_change,
    "p_rope": _p_rope,
    "resonance": _resonance,
}
"""How each method's settings follow from the lengths. Beside them there is `none`."""


def extended_model(model: Transformer.Config, *, original: int, length: int, method: str) -> Transformer.Config:
    """The configuration with which the weights of `model`, trained on `original` tokens, see `length` tokens.

    `none` keeps the rotary embedding: what it derived from the old max_seq_len is written out, so that it turns as
    before. A model that was extended before is extended further by the same method alone.

    Raises:
        ConfigError: not a longer context, an unknown method, or one that does not fit the model's rotary embedding.
    """
    if length <= original:
        raise ConfigError(
            f"--length {length:,} is no extension: the model was trained on sequences of {original:,} tokens; ask for "
            "more"
        )
    if method != NONE and method not in METHODS:
        raise ConfigError(f"unknown method {method!r}.{nearest(method, [*METHODS, NONE])}")
    attention = model.attention
    rope = settled(attention.rope, attention.head_dim, model.max_seq_len)
    if method != NONE:
        rope = _extended(rope, attention.head_dim, original, length, method)
    return model.replace(max_seq_len=length, attention=attention.replace(rope=rope))


def settled(rope: Rope, head_dim: int, max_seq_len: int) -> Rope:
    """The same rotation with everything written out that follows from `max_seq_len`, which may then change."""
    built: RotaryEmbedding = rope.build(head_dim=head_dim, max_seq_len=max_seq_len)
    if isinstance(built, BaseChange):
        return rope.replace(theta=built.theta)
    if isinstance(built, Extended):
        return rope.replace(original_length=built.original_length)
    if isinstance(built, Resonance):
        of = settled(built.config.of, head_dim, max_seq_len)
        return rope.replace(of=of, original_length=built.original_length)
    return rope


def _extended(rope: Rope, head_dim: int, original: int, length: int, method: str) -> Rope:
    """`rope` is settled."""
    if isinstance(rope, Resonance.Config) and method == "resonance":
        inner = "yarn" if isinstance(rope.of, PlainRotary.Config) else str(rope.of._variant)
        return rope.replace(of=_extended(rope.of, head_dim, original, length, inner))
    if isinstance(rope, Scaled.Config) and rope._variant == method:
        if isinstance(rope, DynamicNTK.Config):  # it follows the length of the text by itself
            return rope
        return rope.replace(factor=rope.factor * length / original)
    if isinstance(rope, PlainRotary.Config | BaseChange.Config) and rope.theta is not None:
        return METHODS[method](rope.theta, head_dim, original, length)
    if isinstance(rope, NoPE.Config):
        raise ConfigError("the model does not rotate (rope=nope), so there is nothing to extend; use --method none")
    raise ConfigError(
        f"the model rotates by {rope._variant}, which {method} cannot build upon; use --method none"
        + (f" or {rope._variant}" if rope._variant in METHODS and not isinstance(rope, PRoPE.Config) else "")
    )


def write_start(
    run_dir: Path,
    source: Checkpoint,
    *,
    model: Transformer.Config,
    optimizer: Optimizer.Config,
    tree: Mapping[str, Any],
    data_fingerprint: str,
) -> Path:
    """Write the checkpoint of step 0 of a new run: the weights of `source`, and an optimizer that knows nothing yet.

    Args:
        model, tree: of the new run. data_fingerprint: of none of its samples (`Mixture.fingerprint_until(0)`).

    Raises:
        CheckpointError: the new run's model has other shapes.
    """
    with torch.device("meta"):
        built = model.build()
    source.check_shapes(built, tree)
    return write_first_checkpoint(
        run_dir,
        model_state=source.load_model_state(),
        shapes={name: parameter.shape for name, parameter in built.named_parameters()},
        state_names=optimizer.build().state_names,
        data_fingerprint=data_fingerprint,
        tree=tree,
        details={"extended_from": {"path": str(source.path.resolve()), "step": source.step, "tokens": source.tokens}},
    )
