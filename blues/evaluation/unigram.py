"""The floor that any language model must get under: what knowing only token frequencies is worth.

In: a prepared or merged dataset. Out: entropies in nats per token.

A merged dataset is treated as training treats it: the distribution is the sources' distributions mixed by weight.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blues.data.merging.merge import Dataset, open_dataset
from blues.data.storage.store import Store
from blues.errors import DataError

BLOCK = 1 << 22
"""Tokens counted at a time."""
MAX_COUNTED = 1 << 26
"""Tokens of a split that are counted at most, in blocks spread evenly over it: frequencies do not need more."""


@dataclass(frozen=True)
class UnigramEntropy:
    """What a model without context would score on the held-out text, in nats per token."""

    own: float
    """Entropy under the held-out text's own frequencies: the best that any context-free model can do on it."""
    trained: float
    """Cross-entropy under the training split's frequencies, each count plus one (Laplace): what a context-free model
    fitted to the training data does. Never below `own`."""


def unigram_entropy(
    data: str | Path | Dataset, *, held_out: str = "validation", training: str = "train"
) -> UnigramEntropy:
    """Of the `held_out` split of a dataset (or the directory of one).

    Raises:
        DataError: a dataset that cannot be read, or a source whose held-out split is empty.
    """
    dataset = data if isinstance(data, Dataset) else open_dataset(data)
    sources = [pair for pair in zip(dataset.stores, dataset.weights, strict=True) if pair[1] > 0]
    size = max(store.manifest["tokenizer"]["n_vocab"] for store, _ in sources)
    held_V, trained_V = np.zeros(size), np.zeros(size)
    for store, weight in sources:
        counts_V = token_counts(store, held_out, size)
        if not counts_V.sum():
            raise DataError(
                f"the {held_out} split of dataset {str(store.path)!r} holds no tokens; prepare it with more documents"
            )
        held_V += float(weight) * counts_V / counts_V.sum()
        smoothed_V = token_counts(store, training, size) + 1.0
        trained_V += float(weight) * smoothed_V / smoothed_V.sum()
    return UnigramEntropy(own=cross_entropy(held_V, held_V), trained=cross_entropy(held_V, trained_V))


def cross_entropy(true_V: NDArray[np.floating], predicted_V: NDArray[np.floating]) -> float:
    """-sum true log predicted, in nats, over the ids that occur; infinite if one of them is predicted never."""
    occurs = true_V > 0
    with np.errstate(divide="ignore"):
        return float(-(true_V[occurs] * np.log(predicted_V[occurs])).sum())


def token_counts(store: Store, split: str, size: int) -> NDArray[np.int64]:
    """Occurrences of each id in [0, size) in a split, or in evenly spaced blocks of one of more than MAX_COUNTED."""
    counts_V = np.zeros(size, dtype=np.int64)
    for start, stop in _blocks(store.num_tokens(split)):
        counts_V += np.bincount(store.read(split, start, stop), minlength=size)
    return counts_V


def _blocks(tokens: int) -> Iterable[tuple[int, int]]:
    spans = [(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]
    keep = min(len(spans), MAX_COUNTED // BLOCK)
    return [spans[index * len(spans) // keep] for index in range(keep)]
