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

from blues.data.mixture.batches import Batch, Mixture
from blues.data.mixture.packing import IGNORED
from blues.model.transformer import ModelOutput
from blues.training.parallel import Ranks
from blues.training.sequence_parallel import SequenceParallel

MAX_EXPONENT = 700.0
"""exp of more overflows a float64; such a perplexity is reported as infinite."""


class Validation:
    """The validation set of one worker, read once and kept in memory."""

    def __init__(
        self, data: Mixture, num_samples: int, micro_batch_size: int, ranks: Ranks, sequence: SequenceParallel
    ) -> None:
        """Takes `num_samples` samples, or one epoch if the split is smaller; of shared ones this worker's slices."""
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
        rounds = math.ceil(len(micro_batches) / ranks.data_world_size)
        mine = [micro_batches[i] for i in range(ranks.data_rank, len(micro_batches), ranks.data_world_size)]
        self.batches: list[tuple[int, Batch, float]] = [
            (source, sequence.part(data.batch(ids)), 1.0) for source, ids in mine
        ]
        spare = micro_batches[0]
        self.batches += [(spare[0], sequence.part(data.batch(spare[1])), 0.0)] * (rounds - len(mine))

    def run(self, forward: Callable[[Batch], ModelOutput]) -> dict[str, float]:
        """Metrics, given the model's output for a batch and its targets: the mean cross-entropy (nats per target that
        is not padding), and the share of layers that was computed, where tokens may pass them by."""
        layers = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        sums = torch.zeros(len(self.source_names), 2, dtype=torch.float64, device=self.ranks.device)
        with torch.no_grad():
            for source, batch, counted in self.batches:
                count = counted * int((batch.targets != IGNORED).sum())
                output = forward(batch)
                assert output.losses is not None
                sums[source, 0] += output.losses.cross_entropy.double() * count
                sums[source, 1] += count
                if output.compute_LC is not None:
                    layers += counted * output.compute_LC[:, :2].sum(dim=0)
        dist.all_reduce(sums)
        dist.all_reduce(layers)
        totals = sums.cpu()
        loss = float(totals[:, 0].sum() / totals[:, 1].sum())
        perplexity = math.exp(loss) if loss < MAX_EXPONENT else math.inf
        metrics = {"validation/loss": loss, "validation/perplexity": perplexity}
        for name, (total, count) in zip(self.source_names, totals.tolist(), strict=True):
            if count:
                metrics[f"validation/loss/{name}"] = total / count
        came, computed = layers.tolist()
        if computed != came:
            metrics["validation/layers"] = computed / came
        return metrics
