"""The trainer's validation loss of a model that nobody trains, and samples drawn to measure on.

In: a `Mixture` and a model. Out: nats per token over the samples that the trainer validates on too, so that the figures
can stand in one table; batches of samples drawn by a seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from blues.data.mixture.batches import Batch, Mixture
from blues.data.mixture.packing import IGNORED
from blues.model.transformer import Transformer


@torch.no_grad()
def validation_loss(model: Transformer, data: Mixture, *, samples: int, batch_size: int) -> float:
    """Cross-entropy in nats per target that is not padding, over the first `samples` of the split (or one epoch)."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    nats = targets = 0.0
    try:
        for batch in batches(data, range(min(samples, data.num_samples_per_epoch)), batch_size):
            batch = batch.to(device)
            count = int((batch.targets != IGNORED).sum())
            output = model(batch.inputs, batch.targets, documents=batch.documents, languages=batch.languages)
            nats += float(output.losses.cross_entropy.double()) * count
            targets += count
    finally:
        model.train(was_training)
    return nats / targets


def draw_samples(data: Mixture, tokens: int, seed: int) -> list[int]:
    """Distinct samples that hold about `tokens` tokens (at least one sample, at most one epoch), by rising index."""
    everything = data.num_samples_per_epoch
    wanted = min(everything, max(1, -(-tokens // data.config.sequence_length)))
    return sorted(np.random.default_rng(seed).choice(everything, size=wanted, replace=False).tolist())


def batches(data: Mixture, samples: Sequence[int], batch_size: int) -> Iterator[Batch]:
    """These samples in their order."""
    for start in range(0, len(samples), batch_size):
        yield data.batch(samples[start : start + batch_size])
