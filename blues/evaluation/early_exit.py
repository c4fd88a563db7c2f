"""What early exit trades: layers computed against agreement with the whole model, by threshold.

In: a model with `depth=early_exit` and tokens. Out: one `Tradeoff` for each threshold, as a table to choose from.

Legend: B rows, T tokens, N scored tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from blues.errors import ConfigError
from blues.kernels.linear_cross_entropy import IGNORED
from blues.model.depth import EarlyExit
from blues.model.transformer import Transformer
from blues.table import align

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
HEAD_CHUNK = 512
"""Tokens whose logits are held at once."""


@dataclass(frozen=True, kw_only=True)
class Tradeoff:
    """One threshold: `layers` is the share of the tokens' layers that was computed, `agreement` the share of tokens
    whose likeliest next token is that of the whole model, `cross_entropy` nats per target."""

    threshold: float
    layers: float
    agreement: float
    cross_entropy: float


@torch.inference_mode()
def calibrate(
    model: Transformer, tokens_BT: Tensor, thresholds: Sequence[float] = THRESHOLDS, targets_BT: Tensor | None = None
) -> list[Tradeoff]:
    """The trade-off at each threshold, in their order, of the confidence that the model is configured with.

    Rows are read one at a time, so that the layers counted are those of tokens alone.

    Args:
        targets_BT: the id that follows each token, -100 where nothing is scored; by default those of the rows
            themselves. Layers count for all tokens.

    Raises:
        ConfigError: the model has no exits, or a threshold is not from 0 to 1.
    """
    if targets_BT is None:
        tokens_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    was_training = model.training
    model.eval()
    try:
        with at_threshold(model, 1.0):
            whole = [_best(model, row, target)[0] for row, target in _rows(tokens_BT, targets_BT)]
        return [_tradeoff(model, threshold, tokens_BT, targets_BT, whole) for threshold in thresholds]
    finally:
        model.train(was_training)


def calibration_table(tradeoffs: Sequence[Tradeoff]) -> str:
    """As text for a terminal."""
    rows = [["threshold", "layers", "top-1 as whole", "nats/token"]]
    rows += [
        [f"{t.threshold:g}", f"{100 * t.layers:.1f}%", f"{100 * t.agreement:.2f}%", f"{t.cross_entropy:.4f}"]
        for t in tradeoffs
    ]
    return "\n".join(align(rows))


@contextmanager
def at_threshold(model: Transformer, threshold: float) -> Iterator[None]:
    """The model leaves by another threshold inside the block.

    Raises:
        ConfigError: the model has no exits, or the threshold is not from 0 to 1.
    """
    before = model.depth
    if not isinstance(before, EarlyExit):
        raise ConfigError("thresholds are of models with model.depth=early_exit; this one's tokens cannot leave early")
    model.depth = before.config.replace(threshold=threshold).build(num_layers=before.num_layers)
    try:
        yield
    finally:
        model.depth = before


def _tradeoff(
    model: Transformer, threshold: float, tokens_BT: Tensor, targets_BT: Tensor, whole: Sequence[Tensor]
) -> Tradeoff:
    computed = came = same = scored = 0
    nats = 0.0
    with at_threshold(model, threshold):
        for (row_1T, target_1T), whole_N in zip(_rows(tokens_BT, targets_BT), whole, strict=True):
            best_N, row_nats = _best(model, row_1T, target_1T)
            counts_LC = model(row_1T, num_logits=1).compute_LC
            assert counts_LC is not None
            tokens, block_tokens = counts_LC[:, :2].sum(dim=0).tolist()
            came, computed = came + tokens, computed + block_tokens
            same, scored, nats = same + int((best_N == whole_N).sum()), scored + len(best_N), nats + row_nats
    return Tradeoff(
        threshold=threshold,
        layers=computed / max(came, 1),
        agreement=same / max(scored, 1),
        cross_entropy=nats / max(scored, 1),
    )


def _rows(tokens_BT: Tensor, targets_BT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(tokens_BT.split(1), targets_BT.split(1), strict=True)


def _best(model: Transformer, row_1T: Tensor, target_1T: Tensor) -> tuple[Tensor, float]:
    """The likeliest next token of each scored one, `best_N`, and the sum of their losses."""
    x_1TD, _ = model.hidden(row_1T)
    scored_T = target_1T[0] != IGNORED
    best, nats = [], 0.0
    pairs = zip(x_1TD[0, scored_T].split(HEAD_CHUNK), target_1T[0, scored_T].split(HEAD_CHUNK), strict=True)
    for x_ND, target_N in pairs:
        logits_NV = model.logits(x_ND)
        best.append(logits_NV.argmax(dim=-1))
        nats += float(torch.nn.functional.cross_entropy(logits_NV, target_N, reduction="sum"))
    return torch.cat(best), nats
