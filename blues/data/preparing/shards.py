"""One task of preparing a dataset: read a group of parts, tokenize, write one chunk for each split.

In: the parts, the tokenizer, the rule that splits documents. Out: chunks and rejected rows on disk, and a `TaskResult`
beside them that says the task is done. A task's files depend on its input and settings alone, so any number of
processes may share the tasks, and a task that was interrupted is simply done again.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from blues import config as cfg
from blues.data.reading.places import Place
from blues.data.reading.readers import Document, Part, Rejected, read_part
from blues.data.storage.chunks import ChunkRecord, ChunkWriter, Compression
from blues.data.storage.manifest import encode_json, parse_json
from blues.data.storage.store import SPLITS
from blues.data.tokenizer import Tokenizer

TASKS = "tasks"
"""Where the results lie while a dataset is being made."""

HASH_RANGE = 1 << 64
REJECTED_CHARACTERS = 256  # what a rejected row counts for in it
BATCH_CHARACTERS = 1 << 20
"""Text that is held and tokenized at a time."""


@dataclass(frozen=True)
class Split:
    """Which documents are held out: those whose id hashes below `threshold` (of 2**64), for any order and grouping."""

    threshold: int

    @classmethod
    def fraction(cls, share: float) -> Split:
        """Hold out this share of the documents."""
        return cls(int(share * HASH_RANGE))

    def of(self, place: int) -> str:
        """The split of a document with this `place_of`."""
        return "validation" if place < self.threshold else "train"


def place_of(document_id: str) -> int:
    """Where an id falls in [0, 2**64): uniform, and the same on every machine."""
    return xxhash.xxh3_64_intdigest(document_id.encode(), seed=0)


@dataclass(frozen=True)
class TaskResult:
    """What a finished task left. rejected: rows by reason. lowest, highest: `place_of` its documents, None without."""

    chunks: tuple[ChunkRecord, ...]
    rejected: dict[str, int] = field(default_factory=dict)
    lowest: int | None = None
    highest: int | None = None

    @property
    def tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def documents(self) -> int:
        return sum(chunk.documents for chunk in self.chunks)

    @classmethod
    def read(cls, directory: Path, number: int) -> TaskResult | None:
        """The result of task `number`, or None if it is not finished (or its files are not all there)."""
        try:
            tree = parse_json(result_file(directory, number).read_bytes())
            result = cls(**{**tree, "chunks": tuple(ChunkRecord.from_tree(chunk) for chunk in tree["chunks"])})
            records = [record for chunk in result.chunks for record in (chunk.data, chunk.index)]
            whole = all((directory / record.file).stat().st_size == record.bytes for record in records)
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return result if whole and rejected_file(directory, number).is_file() else None


def result_file(directory: Path, number: int) -> Path:
    """Says that a task is done; written last."""
    return directory / TASKS / f"{number:05d}.json"


def rejected_file(directory: Path, number: int) -> Path:
    """The rows a task could not use, as JSON Lines."""
    return directory / TASKS / f"{number:05d}.rejected.jsonl"


@dataclass(frozen=True)
class Recipe:
    """How a dataset is made of documents: the rule that splits them, which version it is, how chunks are stored."""

    split: Split
    version: int = 1
    compression: Compression = "none"


def run_task(
    directory: Path, number: int, place: Place, parts: Sequence[Part], tokenizer: Tokenizer, recipe: Recipe
) -> TaskResult:
    """Do task `number` of the dataset that grows in `directory`.

    Raises:
        DataError: a file vanished, changed or cannot be read.
    """
    (directory / TASKS).mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    places: list[int] = []
    writers: dict[str, ChunkWriter] = {}
    with ExitStack() as undo:
        # Renamed when it is whole: a worker that outlives its killed driver may be doing this task as well.
        growing = rejected_file(directory, number).with_suffix(f".{os.getpid()}.tmp")
        undo.callback(growing.unlink, missing_ok=True)
        with open(growing, "wb") as quarantine:
            for documents, rejected in _batches(place, parts):
                for record in rejected:
                    counts[record.reason] += record.rows
                    quarantine.write(rejected_line(record))
                for document, tokens in zip(documents, _tokenize(documents, tokenizer), strict=True):
                    places.append(place_of(document.id))
                    name = recipe.split.of(places[-1])
                    if name not in writers:
                        writers[name] = ChunkWriter(
                            directory, name, number, version=recipe.version, compression=recipe.compression
                        )
                        undo.callback(writers[name].abort)
                    writers[name].add(
                        tokens,
                        id=document.id,
                        source=document.source,
                        text_bytes=len(document.text.encode("utf-8")),
                        metadata=document.metadata,
                    )
            quarantine.flush()
            os.fsync(quarantine.fileno())
        os.replace(growing, rejected_file(directory, number))
        chunks = tuple(writers[name].close() for name in SPLITS if name in writers)
        undo.pop_all()
    result = TaskResult(chunks, dict(counts), min(places, default=None), max(places, default=None))
    cfg.write_atomic(result_file(directory, number), encode_json(asdict(result)))
    return result


def _batches(place: Place, parts: Sequence[Part]) -> Iterator[tuple[list[Document], list[Rejected]]]:
    """Some documents at a time, about BATCH_CHARACTERS, so that a tokenizer is not called for each."""
    documents: list[Document] = []
    rejected: list[Rejected] = []
    size = 0
    for part in parts:
        for record in read_part(place, part):
            if isinstance(record, Rejected):
                rejected.append(record)
                size += REJECTED_CHARACTERS
            else:
                documents.append(record)
                size += len(record.text)
            if size >= BATCH_CHARACTERS:
                yield documents, rejected
                documents, rejected, size = [], [], 0
    yield documents, rejected


def _tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The tokens of each document with the closing `<|endoftext|>`."""
    end = np.uint32(tokenizer.eot_id)
    for tokens in tokenizer.encode_arrays([document.text for document in documents]):
        yield np.append(tokens, end)


def rejected_line(record: Rejected) -> bytes:
    """One line of quarantine.jsonl: file, row, reason, and detail and number of rows where they say something."""
    tree = asdict(record)
    if not record.detail:
        del tree["detail"]
    if record.rows == 1:
        del tree["rows"]
    return encode_json(tree)
