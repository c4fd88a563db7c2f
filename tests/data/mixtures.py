"""Small datasets whose windows can be told apart, their mixtures, and what to compare batches with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from blues.data.merging.merge import merge
from blues.data.mixture.batches import Batch, Mixture, Phase
from tests.data.datasets import TOKENIZER, make_numbered, make_store

LENGTH = 8
WINDOWS = {"a": 40, "b": 11, "c": 5}
FIRST = {"a": 0, "b": 100, "c": 200}


def make_folder(folder: Path) -> Path:
    """Three datasets whose windows are told apart by their first token, and their mixture `mix` of 0.5 0.3 0.2; and one
    of many documents, `texts`, which `prose` mixes with the first one."""
    for name, windows in WINDOWS.items():
        make_numbered(folder / name, windows=windows, length=LENGTH, first=FIRST[name])
    merge([folder / name for name in WINDOWS], folder / "mix", weights=[0.5, 0.3, 0.2])
    sizes = np.random.default_rng(0).integers(1, 20, 90).tolist()
    documents = [[number % 256] * size for number, size in enumerate(sizes)]
    make_store(folder / "texts", train=[documents[:50], documents[50:]], validation=[documents[:9]])
    merge([folder / "texts", folder / "a"], folder / "prose", strategy="proportional", report=lambda message: None)
    return folder


def open_mixture(path: Path, *, split: str = "train", **settings: Any) -> Mixture:
    return Mixture.Config(path=str(path), tokenizer=TOKENIZER, **{"sequence_length": LENGTH, **settings}).build(
        split=split
    )


def phases(*changes: tuple[int, list[float]]) -> tuple[Phase, ...]:
    return tuple(Phase(start=start, weights=tuple(weights)) for start, weights in changes)


def equal(first: Batch, second: Batch) -> bool:
    """Every tensor, bit for bit."""
    return all(
        (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))
        for a, b in zip(first, second, strict=True)
    )


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*batches, strict=True)))


def first_tokens(mixture: Mixture, indices: Any) -> list[int]:
    """The first token of each sample: in the datasets here it names the window."""
    return mixture.batch(indices).inputs[:, 0].tolist()
