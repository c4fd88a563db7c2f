"""Merge prepared datasets into a weighted mixture, without copying a token.

In: dataset directories and how much of each. Out: a directory with `mixture.json` (sources, exact weights, checksums),
and `Dataset`, the one view of "a prepared dataset or a mixture of them" that the batches and `verify` work on.

Weights are shares of the training samples, kept as exact fractions: `0.7 0.3` means that of every ten samples seven
come from the first source. Those with a common denominator above 65,536 (numbers of tokens, odd decimals) are rounded
once, here; what mixture.json says is what training does, at every prefix. Merging again with other weights is free and
loses nothing: the sources stay as they are.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

import xxhash

from blues.config import nearest
from blues.data import store as st
from blues.data.manifest import MIXTURE, MIXTURE_FORMAT, read_checked_json, write_checked_json
from blues.data.schedule import MAX_PERIOD, round_weights
from blues.errors import DataError

logger = logging.getLogger("blues")

FORMAT = MIXTURE_FORMAT
VERSION = 2
Strategy = Literal["weighted", "equal", "proportional"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)


@dataclass(frozen=True)
class Dataset:
    """One prepared dataset, or a mixture of several: names, stores and weights in the same order. Weights sum to 1."""

    path: Path
    names: tuple[str, ...]
    stores: tuple[st.Store, ...]
    weights: tuple[Fraction, ...]
    strategy: str

    @property
    def fingerprint(self) -> str:
        """Changes with the content of any source, their order, or a weight; not with where they lie."""
        parts = [f"{store.fingerprint}:{weight}" for store, weight in zip(self.stores, self.weights, strict=True)]
        return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())

    @property
    def merged(self) -> bool:
        """True for a mixture, False for a single prepared dataset."""
        return self.strategy != "single"


def open_dataset(path: str | Path) -> Dataset:
    """Open a prepared dataset or a merged one.

    Raises:
        DataError: neither of the two, damaged, or a source of the mixture is missing or is not the merged one any more.
    """
    path = Path(path)
    strategy, sources = sources_of(path)
    names, weights, openers = zip(*sources, strict=True)
    return Dataset(path, names, tuple(open_source() for open_source in openers), weights, strategy)


def sources_of(
    path: Path, *, check_sizes: bool = True
) -> tuple[str, list[tuple[str, Fraction, Callable[[], st.Store]]]]:
    """The strategy; and name, weight and a function that opens it, of every source (itself, if it is not merged).

    Raises:
        DataError: `path` is no dataset, or its mixture.json is damaged; the functions raise it for their source.
    """
    if not (path / MIXTURE).exists():
        name = path.absolute().name
        return "single", [(name, Fraction(1), functools.partial(st.Store.open, path, check_sizes=check_sizes))]
    tree = read_checked_json(path, MIXTURE, FORMAT, VERSION)
    return tree["strategy"], [
        (source["name"], Fraction(source["weight"]), functools.partial(_open_merged, path, source, check_sizes))
        for source in tree["sources"]
    ]


def _open_merged(path: Path, source: dict[str, Any], check_sizes: bool) -> st.Store:
    where = path / source["path"]
    if not where.exists():
        raise DataError(
            f"source {source['name']!r} of the merged dataset {str(path)!r} is not at {str(where)!r}; "
            f"put it back or merge again"
        )
    # The version that was merged: one that came after it changes nothing here.
    if not st.has_version(where, source["checksum"]):
        raise DataError(
            f"source {source['name']!r} of {str(path)!r} was prepared again after the merge ({str(where)!r}); "
            f"merge again"
        )
    return st.Store.open(where, check_sizes=check_sizes, checksum=source["checksum"])


def merge(
    datasets: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    strategy: str = "weighted",
    overwrite: bool = False,
    report: Callable[[str], None] = logger.warning,
) -> Dataset:
    """Write a merged dataset at `output` and open it.

    Args:
        weights: one for each dataset, for the strategy `weighted` only; any positive scale, 7 3 is 0.7 0.3.
        strategy: `weighted`; `equal` gives every dataset the same share; `proportional` as many as it has tokens.
        overwrite: replace another merged dataset at `output` (never a prepared one).
        report: told by how much the weights had to be rounded, if they had to be.

    Raises:
        DataError: a dataset that cannot be opened, is merged itself, comes twice or has another tokenizer; weights
            that do not fit; an output that holds something else.
    """
    paths = [Path(path) for path in datasets]
    if not paths:
        raise DataError("nothing to merge: name at least one prepared dataset")
    stores = [_open_source(path) for path in paths]
    _check_sources(paths, stores)
    tokens = [store.num_tokens("train") for store in stores]
    asked = _shares(weights, strategy, tokens)
    shares = round_weights(asked)
    rounding = max(abs(share - wanted) for share, wanted in zip(shares, asked, strict=True))
    output = Path(output)
    sources = [
        {
            "name": name,
            "path": _reference(path, output),
            "checksum": store.checksum,
            "fingerprint": store.fingerprint,
            "train_tokens": count,
            "weight": str(share),
        }
        for name, path, store, count, share in zip(_names(paths), paths, stores, tokens, shares, strict=True)
    ]
    tree: dict[str, Any] = {
        "format": FORMAT,
        "format_version": VERSION,
        "strategy": strategy,
        "rounding": float(rounding),
        "sources": sources,
    }
    _write(output, tree, overwrite)
    if rounding:
        report(f"weights rounded to parts of {MAX_PERIOD:,}; the largest change of a share is {float(rounding):.1e}")
    return open_dataset(output)


def _open_source(path: Path) -> st.Store:
    if (path / MIXTURE).exists():
        inner = " ".join(str(store.path) for store in open_dataset(path).stores)
        raise DataError(f"{str(path)!r} is itself a merged dataset; merge its sources instead: {inner}")
    return st.Store.open(path)


def _check_sources(paths: list[Path], stores: list[st.Store]) -> None:
    seen: dict[Path, Path] = {}
    for path, store in zip(paths, stores, strict=True):
        if path.resolve() in seen:
            raise DataError(f"{str(path)!r} is named twice; name it once and give it a larger weight")
        seen[path.resolve()] = path
        if store.tokenizer != stores[0].tokenizer:
            raise DataError(
                f"{str(path)!r} has vocab_size {store.tokenizer.vocab_size or 'null (all)'} and {str(paths[0])!r} has "
                f"{stores[0].tokenizer.vocab_size or 'null (all)'}; prepare both with the same --vocab-size"
            )
        if store.num_tokens("train") == 0:
            raise DataError(f"{str(path)!r} has no training tokens; leave it out")


def _shares(weights: Sequence[float] | None, strategy: str, tokens: list[int]) -> list[Fraction]:
    """The share of each source as an exact fraction; they sum to 1."""
    if strategy not in STRATEGIES:
        raise DataError(f"unknown merge strategy {strategy!r}.{nearest(strategy, STRATEGIES)}")
    if strategy != "weighted":
        if weights is not None:
            raise DataError(f"weights mean nothing to the strategy {strategy!r}; leave them out or use 'weighted'")
        parts = [Fraction(count) if strategy == "proportional" else Fraction(1) for count in tokens]
    else:
        if weights is None:
            raise DataError(
                "the strategy 'weighted' needs weights, one for each dataset; or use 'equal' or 'proportional'"
            )
        if len(weights) != len(tokens):
            raise DataError(f"{len(weights)} weights for {len(tokens)} datasets; give one weight for each dataset")
        for weight in weights:
            if not math.isfinite(weight) or weight < 0:
                raise DataError(
                    f"weight {weight} is not a share; weights are zero or positive numbers, such as 0.7 0.3"
                )
        parts = [Fraction(repr(float(weight))) for weight in weights]  # 0.7 is meant as seven tenths
    total = sum(parts)
    if total <= 0:
        raise DataError("the weights sum to zero; at least one must be positive")
    return [part / total for part in parts]


def _names(paths: list[Path]) -> list[str]:
    """The folders' names, told apart by a number where they are equal."""
    names: list[str] = []
    for path in paths:
        name, number = path.resolve().name, 1
        while name in names:
            number += 1
            name = f"{path.resolve().name}-{number}"
        names.append(name)
    return names


def _reference(path: Path, output: Path) -> str:
    """How the mixture names a source: relative where both lie under a common folder, so that the folder can move."""
    source, base = path.resolve(), output.resolve()
    if os.path.commonpath([source, base]) == os.path.sep:
        return str(source)
    return os.path.relpath(source, base)


def _write(output: Path, tree: dict[str, Any], overwrite: bool) -> None:
    target = output / MIXTURE
    if output.exists() and not output.is_dir():
        raise DataError(f"{str(output)!r} is a file; choose a directory for the merged dataset")
    if output.exists() and not target.exists() and any(output.iterdir()):
        raise DataError(
            f"{str(output)!r} already holds something else; choose another directory for the merged dataset"
        )
    if target.exists() and not overwrite:
        present = read_checked_json(output, MIXTURE, FORMAT, VERSION)
        present.pop("checksum")
        if present != tree:
            raise DataError(
                f"{str(output)!r} already holds another merged dataset; choose another directory or pass --overwrite"
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    write_checked_json(target, tree)
