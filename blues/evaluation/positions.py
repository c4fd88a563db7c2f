"""Loss by position: what a token gains from the text before it, and whether that goes on beyond the trained length.

In: a `LoadedModel` and held-out sequences as long as its context. Out: `PositionLosses`: nats per token and perplexity
of equal stretches of positions, with intervals.

Legend: B sequences of a batch, N in all, T positions, D width, V vocabulary, S stretches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from blues import config as cfg
from blues.data.mixture.batches import Mixture
from blues.data.mixture.packing import IGNORED
from blues.errors import ConfigError
from blues.evaluation.long_context import LongContext
from blues.evaluation.perplexity import perplexity
from blues.inference.loading import LoadedModel
from blues.kernels.precision import at_least_float32
from blues.model.transformer import Transformer
from blues.table import align

TOKENS_AT_ONCE = 2048
"""Positions whose logits are held at a time."""


@dataclass(frozen=True)
class PositionLosses:
    """Stretch s holds positions `edges[s]` up to, not including, `edges[s + 1]`; position 0 predicts the second token.

    nats: mean loss. spread: half the 95% interval of the mean, sequences taken as independent; NaN for one sequence.
    """

    edges: tuple[int, ...]
    nats: tuple[float, ...]
    spread: tuple[float, ...]
    sequences: int

    @classmethod
    def of(cls, nats_NT: NDArray[np.floating], buckets: int) -> PositionLosses:
        """From the loss of each token of N sequences, NaN where there is none."""
        length = nats_NT.shape[1]
        edges = [round(length * bucket / buckets) for bucket in range(buckets + 1)]
        means, spreads = [], []
        for start, stop in zip(edges, edges[1:], strict=False):
            part = nats_NT[:, start:stop]
            means_N = part[~np.isnan(part).all(1)]
            means_N = np.nanmean(means_N, 1)
            means.append(float(np.nanmean(part)) if len(means_N) else math.nan)
            enough = len(means_N) > 1
            spreads.append(float(1.96 * means_N.std(ddof=1) / math.sqrt(len(means_N))) if enough else math.nan)
        return cls(tuple(edges), tuple(means), tuple(spreads), len(nats_NT))

    def perplexities(self) -> list[tuple[float, float, float]]:
        """Perplexity of each stretch, and the ends of its interval."""
        found = []
        for nats, spread in zip(self.nats, self.spread, strict=True):
            half = 0.0 if math.isnan(spread) else spread
            found.append((perplexity(nats), perplexity(nats - half), perplexity(nats + half)))
        return found

    def mean(self, start: int, stop: int) -> float:
        """Nats per token of the stretches that lie within positions [start, stop), each by its size."""
        spans = zip(self.edges, self.edges[1:], self.nats, strict=False)
        inside = [(b - a, nats) for a, b, nats in spans if a >= start and b <= stop]
        return sum(n * nats for n, nats in inside) / sum(n for n, _ in inside) if inside else math.nan

    def metrics(self) -> dict[str, float]:
        """`positions/192-256/perplexity` and so on."""
        spans = zip(self.edges, self.edges[1:], self.nats, strict=False)
        return {f"positions/{a}-{b}/perplexity": perplexity(nats) for a, b, nats in spans}

    def to_tree(self) -> dict[str, Any]:
        """Plain values for JSON; what is undefined is None."""
        spread = [None if math.isnan(value) else value for value in self.spread]
        return {"edges": list(self.edges), "nats": list(self.nats), "spread": spread, "sequences": self.sequences}

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> PositionLosses:
        """What `to_tree` wrote."""
        spread = tuple(math.nan if value is None else value for value in tree["spread"])
        return cls(tuple(tree["edges"]), tuple(tree["nats"]), spread, tree["sequences"])

    def table(self) -> str:
        """One row for each stretch."""
        rows = [["positions", "nats/token", "perplexity", "95% interval"]]
        spans = zip(self.edges, self.edges[1:], self.nats, self.perplexities(), strict=False)
        for start, stop, nats, (middle, low, high) in spans:
            rows.append([f"{start:,}-{stop:,}", f"{nats:.4f}", f"{middle:,.2f}", f"{low:,.2f}-{high:,.2f}"])
        return "\n".join([f"perplexity by position, over {self.sequences:,} sequences", *align(rows)])


class Positions(LongContext, variant="positions"):
    """Perplexity by position: the loss of held-out tokens by how much text stands before them (arXiv 2108.12409).

    samples: sequences, or as many as the split has. buckets: equal stretches of positions.
    """

    @cfg.configclass
    class Config(LongContext.Config):
        buckets: int = 16

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.buckets < 1:
                raise ConfigError(f"buckets: must be at least 1, got {self.buckets}")

    config: Config

    @torch.inference_mode()
    def run(self, loaded: LoadedModel, data: Mixture) -> PositionLosses:
        """See the family."""
        samples = min(self.config.samples, data.num_samples_per_epoch)
        rows = []
        for start in range(0, samples, self.config.batch_size):
            batch = data.batch(range(start, min(samples, start + self.config.batch_size))).to(loaded.device)
            nats_BT = token_losses(loaded.model, batch.inputs, batch.targets, documents=batch.documents)
            rows.append(nats_BT.double().cpu().numpy())
        return PositionLosses.of(np.concatenate(rows), min(self.config.buckets, data.config.sequence_length))


def token_losses(
    model: Transformer, tokens_BT: Tensor, targets_BT: Tensor, *, documents: Tensor | None = None
) -> Tensor:
    """`nats_BT`, the loss of each token (NaN where the target is padding), never holding the logits of all."""
    x_BTD, _ = model.hidden(tokens_BT, documents=documents)
    weight_VD = model.embedding.weight if model.head is None else model.head.weight
    targets = targets_BT.flatten()
    parts = [
        F.cross_entropy(at_least_float32(F.linear(x, weight_VD)), own, ignore_index=IGNORED, reduction="none")
        for x, own in zip(x_BTD.flatten(0, 1).split(TOKENS_AT_ONCE), targets.split(TOKENS_AT_ONCE), strict=True)
    ]
    return torch.cat(parts).masked_fill(targets == IGNORED, math.nan).view_as(targets_BT)
