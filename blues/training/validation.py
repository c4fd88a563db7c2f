"""Validation loss over a fixed set of samples, exact for any number of workers.

In: the first N samples of the validation split. Out: the mean cross-entropy per token, overall and for each source.

Every micro batch holds samples of one source, so that its mean loss times its targets is that source's sum. The sums
are added in float64 over all workers and divided once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from blues.data.mixture.batches import Batch, Mixture
from blues.data.mixture.packing import IGNORED
from blues.training.parallel import Ranks

MAX_EXPONENT = 700.0
"""exp of more overflows a float64; such a perplexity is reported as infinite."""


class Validation:
    """The validation set of one worker, read once and kept in memory."""

    def __init__(self, data: Mixture, num_samples: int, micro_batch_size: int, ranks: Ranks) -> None:
        """Takes `num_samples` samples, or one epoch if the split is smaller."""
        self.ranks, self.source_names = ranks, list(data.source_names)
        self.num_samples = min(num_samples, data.num_samples_per_epoch)
        by_source: dict[int, list[int]] = defaultdict(list)
        for index, source in enumerate(data.windows_of(range(self.num_samples))[0].tolist()):
            by_source[source].append(index)
        micro_batches = [
            (source, indices[start : start + micro_batch_size])
            for source, indices in sorted(by_source.items())
            for start in range(0, len(indices), micro_batch_size)
        ]
        # Every worker runs equally many forward passes, as ZeRO-3 fetches weights together; a spare one counts nothing.
        rounds = math.ceil(len(micro_batches) / ranks.world_size)
        mine = [micro_batches[i] for i in range(ranks.rank, len(micro_batches), ranks.world_size)]
        self.batches: list[tuple[int, Batch, float]] = [(source, data.batch(ids), 1.0) for source, ids in mine]
        spare = micro_batches[0]
        self.batches += [(spare[0], data.batch(spare[1]), 0.0)] * (rounds - len(mine))

    def run(self, cross_entropy: Callable[[Batch], Tensor]) -> dict[str, float]:
        """Metrics, given the mean cross-entropy (nats per target that is not padding) of a batch."""
        sums = torch.zeros(len(self.source_names), 2, dtype=torch.float64, device=self.ranks.device)
        with torch.no_grad():
            for source, batch, counted in self.batches:
                count = counted * int((batch.targets != IGNORED).sum())
                sums[source, 0] += cross_entropy(batch).double() * count
                sums[source, 1] += count
        dist.all_reduce(sums)
        totals = sums.cpu()
        loss = float(totals[:, 0].sum() / totals[:, 1].sum())
        perplexity = math.exp(loss) if loss < MAX_EXPONENT else math.inf
        metrics = {"validation/loss": loss, "validation/perplexity": perplexity}
        for name, (total, count) in zip(self.source_names, totals.tolist(), strict=True):
            if count:
                metrics[f"validation/loss/{name}"] = total / count
        return metrics
