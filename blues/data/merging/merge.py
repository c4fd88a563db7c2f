"""Merge prepared datasets into a weighted mixture, without copying a token.

In: dataset directories and how much of each, named by arguments or by a file. Out: a directory with `mixture.json`
(sources, their versions by checksum, exact weights), and `Dataset`, the one view of "a prepared dataset or a mixture of
them" that the batches and `verify` work on.

Weights are shares of the training samples, kept as exact fractions: `0.7 0.3` means that of every ten samples seven
come from the first source. Those with a common denominator above 65,536 (numbers of tokens, odd decimals) are rounded
once, here; what mixture.json says is what training does, at every prefix. Merging again with other weights is free and
loses nothing: the sources stay as they are. A mixture of mixtures is one of their sources, each with the product of the
weights on the way to it.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

import xxhash
import yaml

from blues import config as cfg
from blues.config import nearest
from blues.data.mixture.schedule import MAX_PERIOD, round_weights
from blues.data.storage import store as st
from blues.data.storage.manifest import FORMAT as STORE_FORMAT
from blues.data.storage.manifest import (
    MANIFEST,
    MIXTURE,
    MIXTURE_FORMAT,
    is_count,
    is_path,
    is_share,
    is_text,
    read_checked_json,
    require,
    write_checked_json,
)
from blues.errors import ConfigError, DataError
from blues.table import align

logger = logging.getLogger("blues")

FORMAT = MIXTURE_FORMAT
VERSION = 2
MIXTURE_SHAPE = {
    "strategy": is_text,
    "sources": [
        {
            "name": is_text,
            "path": is_path,
            "version": is_count,
            "checksum": is_text,
            "fingerprint": is_text,
            "train_tokens": is_count,
            "weight": is_share,
        }
    ],
}
"""What a mixture.json holds, for `manifest.require`."""
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

    def newer_versions(self) -> dict[str, tuple[int, int]]:
        """The sources that have a newer version than the one that is used here: name -> (used, newest).

        Raises:
            DataError: the manifest of a source cannot be read any more.
        """
        newest = [read_checked_json(store.path, MANIFEST, STORE_FORMAT, st.VERSION)["version"] for store in self.stores]
        found = zip(self.names, self.stores, newest, strict=True)
        return {name: (store.version, number) for name, store, number in found if number > store.version}


def open_dataset(path: str | Path) -> Dataset:
    """Open a prepared dataset (the newest version, or `DIR@2`) or a merged one (the versions that were merged).

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
        name = st.split_version(path)[0].absolute().name
        return "single", [(name, Fraction(1), functools.partial(st.Store.open, path, check_sizes=check_sizes))]
    tree = read_mixture(path)
    return tree["strategy"], [
        (source["name"], Fraction(source["weight"]), functools.partial(_open_merged, path, source, check_sizes))
        for source in tree["sources"]
    ]


def read_mixture(path: Path) -> dict[str, Any]:
    """The mixture.json of a merged dataset, with everything that reading one relies on.

    Raises:
        DataError: it is damaged or lacks something.
    """
    tree = read_checked_json(path, MIXTURE, FORMAT, VERSION)
    try:
        require(tree, MIXTURE_SHAPE)
    except ValueError as error:
        raise DataError(f"{str(path / MIXTURE)!r} lacks or cannot use {error}; merge again") from None
    if sum(Fraction(source["weight"]) for source in tree["sources"]) != 1:
        raise DataError(f"the weights in {str(path / MIXTURE)!r} are no shares that sum to 1; merge again")
    return tree


def plain_path(path: Path) -> Path:
    """`a/../b` as `b`, where that is the same place (it is not if `a` is a link)."""
    plain = Path(os.path.normpath(path))
    return plain if plain.resolve() == path.resolve() else path


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


@cfg.configclass
class Ingredients(cfg.Config):
    """What is merged, as a file says it under the key `datasets`. Weights belong to the strategy `weighted`."""

    paths: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    merge_strategy: str = "weighted"

    def __post_init__(self) -> None:
        name = self.merge_strategy
        if name not in STRATEGIES:
            raise ConfigError(f"merge_strategy: unknown strategy {name!r}.{nearest(name, STRATEGIES)}")


def read_ingredients(path: str | Path, report: Callable[[str], None] = logger.warning) -> Ingredients:
    """The block `datasets: {paths, weights, merge_strategy}` of a YAML or JSON file; its paths are relative to the
    file's own folder. Other blocks (such as those of an experiment) are left to whom they are for; `report` names them.

    Raises:
        ConfigError: a file that cannot be read, that lacks the block, or an unknown or mistyped key in it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read configuration {str(path)!r}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:  # of JSON, and of bytes that are not UTF-8
        raise ConfigError(f"{str(path)!r} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or "datasets" not in tree:
        keys = [str(key) for key in tree] if isinstance(tree, dict) else []
        near = next((key for key in keys if "Did you mean" in nearest(key, ["datasets"])), None)
        hint = f" (it has {near!r})" if near else ""
        raise ConfigError(f"{str(path)!r} needs the key 'datasets' with paths, weights and merge_strategy{hint}")
    misplaced = [key for key in cfg.fields_of(Ingredients) if key in tree]
    if misplaced:
        raise ConfigError(f"{str(path)}: {misplaced[0]!r} belongs under 'datasets'")
    try:
        found = cfg.load(Ingredients, tree["datasets"], "datasets")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if len(tree) > 1:
        report(f"of {path} only 'datasets' is read, not {', '.join(str(key) for key in tree if key != 'datasets')}")
    return found.replace(paths=tuple(str(path.parent / Path(name).expanduser()) for name in found.paths))


@dataclass(frozen=True)
class Source:
    """A prepared dataset that takes part in a mixture. name: without a slash, and its own among the sources."""

    name: str
    store: st.Store
    weight: Fraction


@dataclass(frozen=True)
class Combination:
    """A mixture that is not written yet. rounding: the largest change of a weight, to make all of them exact.
    merged: the mixtures among the datasets that were named, with their shares."""

    sources: tuple[Source, ...]
    strategy: str
    rounding: Fraction
    merged: tuple[tuple[str, Fraction], ...]

    def remarks(self) -> list[str]:
        """What a person should know of how the weights came about."""
        lines = []
        if self.merged:
            names = " and ".join(repr(name) for name, _ in self.merged)
            exact = "" if self.rounding else "; they stay exact"
            lines.append(f"the sources of {names} take part with their weights times its share{exact}")
        if self.rounding:
            change = f"{float(self.rounding):.1e}"
            lines.append(f"weights rounded to parts of {MAX_PERIOD:,}; the largest change of a share is {change}")
        folders = [source.store.path.resolve() for source in self.sources]
        for folder in sorted({folder for folder in folders if folders.count(folder) > 1}):
            names = " and ".join(s.name for s in self.sources if s.store.path.resolve() == folder)
            lines.append(f"{names} are versions of one dataset: the documents that they share come in each")
        return lines


def combine(
    datasets: Sequence[str | Path], weights: Sequence[float] | None = None, strategy: str = "weighted"
) -> Combination:
    """Open datasets, merged ones as their sources, and settle the share of each. Arguments and errors of `merge`."""
    paths = [Path(path) for path in datasets]
    if not paths:
        raise DataError("nothing to merge: name at least one prepared dataset")
    opened = [_open(path) for path in paths]
    _check_datasets(paths, opened)
    if weights is None and strategy == "weighted" and len(paths) == 1:
        weights = [1.0]
    asked = _shares(weights, strategy, [sum(store.num_tokens("train") for store in of.stores) for of in opened])
    sources = _flatten(opened, asked)
    exact = [source.weight for source in sources]
    shares = round_weights(exact)
    return Combination(
        sources=tuple(replace(source, weight=share) for source, share in zip(sources, shares, strict=True)),
        strategy=strategy,
        rounding=max(abs(share - wanted) for share, wanted in zip(shares, exact, strict=True)),
        merged=tuple((_folder(of.path), share) for of, share in zip(opened, asked, strict=True) if of.merged),
    )


def _open(path: Path) -> Dataset:
    folder, number = st.split_version(path)
    if number is not None and (folder / MIXTURE).exists():
        raise DataError(f"{str(folder)!r} is a merged dataset and has no versions; name it without @{number}")
    return open_dataset(path)


def _flatten(opened: Sequence[Dataset], shares: Sequence[Fraction]) -> list[Source]:
    """The sources of all datasets with the product of their weights; one that comes in several ways, with the sum."""
    parts: dict[tuple[Path, str], Source] = {}
    origins: dict[tuple[Path, str], Dataset] = {}
    for dataset, share in zip(opened, shares, strict=True):
        for name, store, weight in zip(dataset.names, dataset.stores, dataset.weights, strict=True):
            key = (store.path.resolve(), store.checksum)
            before = parts[key].weight if key in parts else Fraction(0)
            parts[key] = Source(name, store, before + share * weight)
            origins.setdefault(key, dataset)
    named: list[Source] = []
    plain = [source.name for source in parts.values()]
    folders = [folder for folder, _ in parts]
    for key, source in parts.items():
        name, dataset = source.name, origins[key]
        if folders.count(key[0]) > 1:
            name = f"{name}@{source.store.version}"
        elif dataset.merged and plain.count(name) > 1:
            name = f"{_folder(dataset.path)}.{name}"
        named.append(replace(source, name=_free(name, [other.name for other in named])))
    return named


def _folder(path: Path) -> str:
    return st.split_version(path)[0].resolve().name


def _free(name: str, taken: Sequence[str]) -> str:
    """The name itself, with a number where it is taken."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free


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
        datasets: prepared or merged ones; `DIR@2` for version 2, else the newest. The version that is taken stays.
        weights: one for each dataset, for the strategy `weighted` only; any positive scale, 7 3 is 0.7 0.3.
        strategy: `weighted`; `equal` gives every dataset the same share; `proportional` as many as it has tokens.
        overwrite: replace another merged dataset at `output` (never a prepared one).
        report: told where weights had to be rounded, and what became of mixtures among the datasets.

    Raises:
        DataError: a dataset that cannot be opened, comes twice or has another tokenizer; weights that do not fit; an
            output that holds something else.
    """
    combined = combine(datasets, weights, strategy)
    output = Path(output)
    tree: dict[str, Any] = {
        "format": FORMAT,
        "format_version": VERSION,
        "strategy": strategy,
        "rounding": float(combined.rounding),
        "merged": [{"name": name, "weight": str(share)} for name, share in combined.merged],
        "sources": [
            {
                "name": source.name,
                "path": _reference(source.store.path, output),
                "version": source.store.version,
                "checksum": source.store.checksum,
                "fingerprint": source.store.fingerprint,
                "train_tokens": source.store.num_tokens("train"),
                "weight": str(source.weight),
            }
            for source in combined.sources
        ],
    }
    _write(output, tree, overwrite)
    for line in combined.remarks():
        report(line)
    return open_dataset(output)


def _check_datasets(paths: list[Path], opened: list[Dataset]) -> None:
    seen: set[tuple[Path, str]] = set()
    first = opened[0].stores[0].tokenizer
    for path, dataset in zip(paths, opened, strict=True):
        key = (st.split_version(path)[0].resolve(), "" if dataset.merged else dataset.stores[0].checksum)
        if key in seen:
            raise DataError(f"{str(path)!r} is named twice; name it once and give it a larger weight")
        seen.add(key)
        own = dataset.stores[0].tokenizer  # those of a mixture agree
        if own != first:
            raise DataError(
                f"{str(path)!r} has vocab_size {own.vocab_size or 'null (all)'} and {str(paths[0])!r} has "
                f"{first.vocab_size or 'null (all)'}; prepare both with the same --vocab-size"
            )
        if not all(store.num_tokens("train") for store in dataset.stores):
            raise DataError(f"{str(path)!r} has no training tokens; leave it out")


def _shares(weights: Sequence[float] | None, strategy: str, tokens: list[int]) -> list[Fraction]:
    """The share of each dataset as an exact fraction; they sum to 1."""
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
        present = read_mixture(output)
        present.pop("checksum")
        if present != tree:
            _refuse(output, present, tree)
        return
    output.mkdir(parents=True, exist_ok=True)
    write_checked_json(target, tree)


def _refuse(output: Path, present: dict[str, Any], tree: dict[str, Any]) -> None:
    """Say that there is another mixture, or in what it is an older one of the same."""
    pairs = zip(present["sources"], tree["sources"], strict=False)
    older = [old["name"] for old, new in pairs if old["path"] == new["path"] and old["checksum"] != new["checksum"]]
    of = f" (of other versions of {', '.join(older)})" if older else ""
    raise DataError(
        f"{str(output)!r} already holds another merged dataset{of}; choose another directory or pass --overwrite"
    )


def mixture_table(dataset: Dataset) -> str:
    """The sources of a dataset with their versions and shares, from the manifests alone, and where a newer one is."""
    rows: list[tuple[str, ...]] = [
        ("source", "version", "weight", "train documents", "train tokens", "validation tokens")
    ]
    for name, store, weight in zip(dataset.names, dataset.stores, dataset.weights, strict=True):
        counts = (store.num_documents("train"), store.num_tokens("train"), store.num_tokens("validation"))
        rows.append((name, str(store.version), f"{float(weight):.3f}", *(f"{count:,}" for count in counts)))
    lines = [f"dataset {dataset.path} ({dataset.strategy})", "", *align(rows)]
    for name, (used, newest) in dataset.newer_versions().items():
        lines.append(f"{name} is of version {used}, and its newest is {newest}; merge again to take that one")
    return "\n".join(lines)
