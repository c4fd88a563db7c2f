"""A look into a dataset: what it is made of, some of its documents, and a training sample as a model gets it.

In: a prepared or merged dataset. Out: `Overview` (from manifests and the numbers in the indexes, no token is read),
`Look`s at documents, and a `Window`. How they are shown is the matter of `blues.data.reports.display`.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blues import config as cfg
from blues.data.merging.merge import Dataset, open_dataset, plain_path
from blues.data.mixture.packing import IGNORED, Packing
from blues.data.reports.statistics import Lengths
from blues.data.storage.checking import documents_of
from blues.data.storage.chunks import SUFFIXES
from blues.data.storage.scanning import read_contents
from blues.data.storage.store import SPLITS, Store, StoredDocument, version_numbers
from blues.data.tokenizer import Tokenizer
from blues.errors import ConfigError, DataError


@dataclass(frozen=True)
class SplitOverview:
    """One split of one source. bytes: on disk, of the chunks that it uses. compression: of these, each kind once."""

    source: str
    split: str
    documents: int
    tokens: int
    text_bytes: int
    chunks: int
    bytes: int
    compression: tuple[str, ...]
    lengths: Lengths


@dataclass(frozen=True)
class SourceOverview:
    """A prepared dataset. versions: the numbers there are. operation: what made the version that is shown. origins:
    what it was prepared from. rejected: rows by reason."""

    name: str
    path: Path
    weight: float
    version: int
    versions: tuple[int, ...]
    operation: dict[str, Any]
    tokenizer: str
    settings: dict[str, Any]
    origins: tuple[dict[str, Any], ...]
    rejected: dict[str, int]
    splits: tuple[SplitOverview, ...]


@dataclass(frozen=True)
class Overview:
    """A dataset and its sources (itself, if it is not merged)."""

    path: Path
    strategy: str
    fingerprint: str
    sources: tuple[SourceOverview, ...]


@dataclass(frozen=True)
class Look:
    """A document and where it is: number `number` of its split."""

    dataset: str
    split: str
    number: int
    document: StoredDocument


@dataclass(frozen=True)
class Piece:
    """Tokens `[start, stop)` of a document of `length` tokens, in a window; its closing `<|endoftext|>` is one."""

    id: str
    source: str
    number: int
    start: int
    stop: int
    length: int
    tokens: np.ndarray


@dataclass(frozen=True)
class Window:
    """A training sample: what its targets are, piece by piece, and how many are padding. first_input: the id of the
    token that stands before the first target; every other input is the target before it or an `<|endoftext|>`."""

    dataset: str
    split: str
    index: int
    packing: str
    first_input: int
    pieces: tuple[Piece, ...]
    padding: int


def overview(path: str | Path) -> Overview:
    """What a dataset is made of.

    Raises:
        DataError: it is none, or something of it is damaged.
    """
    dataset = open_dataset(path)
    return Overview(
        path=Path(path),
        strategy=dataset.strategy,
        fingerprint=dataset.fingerprint if dataset.merged else dataset.stores[0].fingerprint,
        sources=tuple(
            _source(name, store, float(weight))
            for name, store, weight in zip(dataset.names, dataset.stores, dataset.weights, strict=True)
        ),
    )


def tokenizer_of(path: str | Path) -> Tokenizer:
    """The tokenizer of a dataset; the sources of a merged one share it."""
    return open_dataset(path).stores[0].tokenizer.build()


def choose_documents(
    path: str | Path,
    count: int,
    *,
    seed: int = 0,
    splits: Sequence[str] = SPLITS,
    source: str | None = None,
    id: str | None = None,
) -> list[Look]:
    """Some documents, drawn without putting back from those that fit, in their order.

    Args:
        source: only of files whose name fits this glob, such as `*.py`.
        id: only with this id.

    Raises:
        DataError: nothing fits.
        ConfigError: count is below 1.
    """
    if count < 1:
        raise ConfigError(f"number of documents (--documents) must be at least 1, got {count}")
    dataset = open_dataset(path)
    shelves = [(name, store, split) for name, store in _named(dataset) for split in splits]
    fitting = [_fitting(store, split, source, id) for _, store, split in shelves]
    sizes = [len(numbers) for numbers in fitting]
    if not sum(sizes):
        wanted = [f"with the id {id!r}"] * (id is not None) + [f"of a file like {source!r}"] * (source is not None)
        raise DataError(f"{str(path)!r} holds no document {' '.join(wanted)} in {' or '.join(splits)}")
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(sum(sizes), size=min(count, sum(sizes)), replace=False))
    found, begin = [], 0
    for (name, store, split), numbers in zip(shelves, fitting, strict=True):
        own = chosen[(chosen >= begin) & (chosen < begin + len(numbers))] - begin
        for number in numbers[own].tolist():
            found.append(Look(name, split, number, store.document(split, number)))
        begin += len(numbers)
    return found


def training_window(
    path: str | Path, index: int, length: int, *, split: str = "train", seed: int = 0, packing: str = "stream"
) -> Window:
    """Sample `index` of a run with sequences of `length` tokens: what `batches.Mixture` gives to a model.

    Raises:
        DataError, ConfigError: as `batches.Mixture`; an index below 0, a packing that is none.
    """
    from blues.data.mixture.batches import (
        Mixture,  # it takes the time of importing torch, which nothing else here needs
    )

    if index < 0:
        raise ConfigError(f"samples (--window) count from 0, got {index}")
    if packing not in Packing.variants:
        raise ConfigError(f"unknown packing {packing!r}.{cfg.nearest(packing, Packing.variants)}")
    chosen = cfg.load(Packing.Config, {cfg.VARIANT_KEY: packing})
    tokenizer = open_dataset(path).stores[0].tokenizer
    config = Mixture.Config(path=str(path), sequence_length=length, seed=seed, tokenizer=tokenizer, packing=chosen)
    mixture: Mixture = config.build(split=split)
    batch, (source, places) = mixture.batch([index]), mixture.pieces_of(index)
    store, targets = mixture.dataset.stores[source], batch.targets[0].numpy()
    return Window(
        dataset=mixture.source_names[source],
        split=split,
        index=index,
        packing=packing,
        first_input=int(batch.inputs[0, 0]),
        pieces=tuple(_pieces(store, split, places, targets[targets != IGNORED].astype(np.uint32))),
        padding=int((targets == IGNORED).sum()),
    )


def with_text(look: Look, tokenizer: Tokenizer) -> dict[str, Any]:
    """A document as a tree for JSON, with its text and its tokens."""
    document = look.document
    return {
        "dataset": look.dataset,
        "split": look.split,
        "number": look.number,
        "id": document.id,
        "source": document.source,
        "metadata": document.metadata,
        "text_bytes": document.text_bytes,
        "text": tokenizer.decode(document.tokens[:-1].tolist()),
        "tokens": document.tokens.tolist(),
    }


def to_json(found: Overview | Window | list[dict[str, Any]]) -> str:
    """Anything of this module as JSON."""

    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, np.ndarray) else str(value)

    return json.dumps(found if isinstance(found, list) else asdict(found), indent=2, default=plain)


def _pieces(store: Store, split: str, places: np.ndarray, tokens: np.ndarray) -> Iterator[Piece]:
    """The documents that lie at these places (starts and ends) of a split; `tokens` are those of all places."""
    ends, taken = store.document_ends(split), 0
    for begin, stop in places.tolist():
        while begin < stop:
            number = int(np.searchsorted(ends, begin, side="right"))
            first = int(ends[number - 1]) if number else 0
            last = min(stop, int(ends[number]))
            document = store.document(split, number)
            yield Piece(
                id=document.id,
                source=document.source,
                number=number,
                start=begin - first,
                stop=last - first,
                length=len(document.tokens),
                tokens=tokens[taken : taken + last - begin],
            )
            taken += last - begin
            begin = last


def _source(name: str, store: Store, weight: float) -> SourceOverview:
    size = store.tokenizer.vocab_size
    return SourceOverview(
        name=name,
        path=plain_path(store.path),
        weight=weight,
        version=store.version,
        versions=tuple(version_numbers(store.path)),
        operation=store.manifest["operation"],
        tokenizer=f"{store.tokenizer.name}{'' if size is None else f' ({size:,} ids)'}",
        settings=store.manifest["settings"],
        origins=tuple(store.manifest["sources"]),
        rejected=store.manifest["rejected"],
        splits=tuple(_split(name, store, split) for split in SPLITS),
    )


def _split(name: str, store: Store, split: str) -> SplitOverview:
    used = [store.chunks[split][number] for number in np.unique(store.segments[split]["chunk"]).tolist()]
    kinds = {chunk.data.file.endswith(SUFFIXES["zstd"]) for chunk in used}
    contents = {chunk: read_contents(store.path, chunk.index) for chunk in used}
    length_D = documents_of(store, split, contents).lengths
    return SplitOverview(
        source=name,
        split=split,
        documents=len(length_D),
        tokens=store.num_tokens(split),
        text_bytes=store.text_bytes(split),
        chunks=len(used),
        bytes=sum(chunk.data.bytes + chunk.index.bytes for chunk in used),
        compression=tuple("zstd" if kind else "none" for kind in sorted(kinds)),
        lengths=Lengths.of(length_D),
    )


def _named(dataset: Dataset) -> Iterator[tuple[str, Store]]:
    return zip(dataset.names, dataset.stores, strict=True)


def _fitting(store: Store, split: str, source: str | None, id: str | None) -> np.ndarray:
    """Numbers of the documents of a split that fit: int64."""
    if source is None and id is None:
        return np.arange(store.num_documents(split))
    found, begin = [np.zeros(0, dtype=np.int64)], 0
    for table in store.tables(split, ["id", "source"]):
        fits = np.ones(len(table), dtype=bool)
        if id is not None:
            fits &= _as_numpy(pc.equal(table["id"], id))
        if source is not None:
            files = [name for name in table["source"].unique().to_pylist() if fnmatch.fnmatchcase(name, source)]
            fits &= _as_numpy(pc.is_in(table["source"], value_set=pa.array(files, pa.string())))
        found.append(begin + np.flatnonzero(fits))
        begin += len(table)
    return np.concatenate(found)


def _as_numpy(column: pa.ChunkedArray) -> np.ndarray:
    return np.array(column.to_pylist(), dtype=bool)
