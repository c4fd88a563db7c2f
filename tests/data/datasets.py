"""Prepared datasets of given documents, in as many chunks as a test wants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from blues.data.storage.chunks import ChunkRecord, ChunkWriter, Compression
from blues.data.storage.store import SPLITS
from blues.data.storage.versions import Draft, write_version
from blues.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.Config(vocab_size=300)
Document = str | list[int]


def make_store(
    directory: Path,
    *,
    train: Sequence[Sequence[Document]] = (),
    validation: Sequence[Sequence[Document]] = (),
    tokenizer: Tokenizer.Config = TOKENIZER,
    compression: Compression = "none",
) -> Path:
    """A dataset whose splits have these chunks of documents (texts, or ids without the closing end-of-text)."""
    directory.mkdir(parents=True)
    built, records = tokenizer.build(), []
    for split, chunks in (("train", train), ("validation", validation)):
        for number, documents in enumerate(chunks):
            writer = ChunkWriter(directory, split, number, compression=compression)
            for position, document in enumerate(documents):
                ids = built.encode(document) if isinstance(document, str) else document
                writer.add(
                    np.array([*ids, built.eot_id], dtype=np.uint32),
                    id=f"{split}-{number}-{position}",
                    source=f"{directory.name}.txt",
                    text_bytes=len(built.decode_bytes(ids)),
                    metadata={"place": position},
                )
            records.append(writer.close())
    return publish(directory, records, tokenizer)


def publish(directory: Path, records: Sequence[ChunkRecord], tokenizer: Tokenizer.Config = TOKENIZER) -> Path:
    """Make a dataset of chunks that lie in a folder."""
    chunks = {split: [record for record in records if record.split == split] for split in SPLITS}
    write_version(directory, 1, Draft(tokenizer=tokenizer, operation={"kind": "prepare"}, chunks=chunks))
    return directory


def make_numbered(directory: Path, *, windows: int, length: int, first: int = 0, held_out: int = 2) -> Path:
    """A dataset of one document without text: its train split cuts into exactly `windows` windows of `length` tokens,
    and the first token of every window is in no other (`first` + number, for less than 256 windows)."""
    assert first + windows <= 256
    ids = [token for window in range(windows) for token in [first + window, *[256] * (length - 1)]]
    return make_store(directory, train=[[ids]], validation=[[ids[: length * held_out]]])


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below a folder with its content, to see that nothing was written."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
