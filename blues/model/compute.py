"""What a forward really computed, where a model can leave something out: counted, not estimated.

In: each layer's counts of a forward, from the device. Out: shares, and floating-point operations per token.

Counts are sums over tokens (int64): those of micro batches and workers may be added. Nothing waits for the device
before `summary` is asked for numbers.

Legend: L layers of the model, P kinds of pairs, C counts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PAIRS = ("chosen", "computed", "null", "skipped", "over_capacity", "dropped_out")
"""Pairs of token and expert in a mixture: that the router chose; of these, that went to experts with matrices; to null
experts (or constants); that the rules of these names took away. The first is the sum of the others."""

COUNTS = ("tokens", "block_tokens", *PAIRS)
"""Of a layer: tokens that came to it, tokens that it computed, and its pairs (0 in a dense layer)."""


def count_pairs(ids_TK: Tensor, num_experts: int) -> Tensor:
    """Slots that hold one of the first `num_experts` experts."""
    return (ids_TK < num_experts).sum()


def layer_counts(tokens: int, block_tokens: int, pairs_P: Tensor | None, device: torch.device) -> Tensor:
    """`counts_C` of one layer in one forward."""
    if pairs_P is None:
        pairs_P = torch.zeros(len(PAIRS), dtype=torch.int64, device=device)
    known = [torch.full((1,), number, dtype=torch.int64, device=device) for number in (tokens, block_tokens)]
    return torch.cat([*known, pairs_P])


class Cost(NamedTuple):
    """Multiplications per token of one layer: one for each parameter in a matrix product."""

    block: int
    """Of a token that the block computes, experts left out."""
    pair: int
    """Of a pair that goes to an expert with matrices."""
    attention: int
    """Of scores and mixing, where the block computes every token of the sequence."""


def flops_per_token(counts_LC: Sequence[Sequence[int]], costs_L: Sequence[Cost], head: int) -> float:
    """Floating-point operations of training per token, as `Transformer.flops_per_token`, of what was computed."""
    total = float(head)
    for row, cost in zip(counts_LC, costs_L, strict=True):
        counted = dict(zip(COUNTS, row, strict=True))
        share = _share(counted["block_tokens"], counted["tokens"])
        total += (
            share * cost.block + share**2 * cost.attention + _share(counted["computed"], counted["tokens"]) * cost.pair
        )
    return 6 * total


def summary(counts_LC: Sequence[Sequence[int]], is_mixture_L: Sequence[bool]) -> dict[str, float]:
    """Metrics of counts that are on the host.

    compute/layers: share of the tokens' layers that were computed. compute/experts: share of the router's pairs that
    went through an expert with matrices; compute/{null, skipped, over_capacity, dropped_out}: where the others are; and
    the same of every mixture as compute/layer_NN/... Pairs of layers that a token did not come to are in none of them.
    """
    rows = [dict(zip(COUNTS, row, strict=True)) for row in counts_LC]
    metrics = {"compute/layers": _share(sum(r["block_tokens"] for r in rows), sum(r["tokens"] for r in rows))}
    for layer, row in enumerate(rows):
        if row["block_tokens"] < row["tokens"]:
            metrics[f"compute/layer_{layer:02d}/layers"] = _share(row["block_tokens"], row["tokens"])
    mixtures = [(layer, row) for layer, row in enumerate(rows) if is_mixture_L[layer]]
    for name in PAIRS[1:]:
        shown = "experts" if name == "computed" else name
        total = sum(row[name] for _, row in mixtures)
        if name != "computed" and not total:
            continue
        metrics[f"compute/{shown}"] = _share(total, sum(row["chosen"] for _, row in mixtures))
        for layer, row in mixtures:
            metrics[f"compute/layer_{layer:02d}/{shown}"] = _share(row[name], row["chosen"])
    return metrics


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
