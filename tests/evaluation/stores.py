"""Prepared datasets of given texts, written the way `blues prepare` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from blues.data import store
from blues.data.tokenizer import Tokenizer
from tests.inference.models import TOKENIZER


def make_store(
    directory: Path,
    *,
    train: Sequence[str | list[int]],
    validation: Sequence[str | list[int]],
    tokenizer: Tokenizer.Config = TOKENIZER,
) -> Path:
    """A dataset with these documents (texts, or token ids without the closing end-of-text) in each split."""
    directory.mkdir(parents=True)
    built, chunks = tokenizer.build(), []
    for split, documents in (("train", train), ("validation", validation)):
        writer = store.ChunkWriter(directory, split, 0)
        for number, document in enumerate(documents):
            ids = built.encode(document) if isinstance(document, str) else document
            tokens = np.array([*ids, built.eot_id], dtype=np.uint32)
            text_bytes = len(built.decode_bytes(ids))
            writer.add(tokens, id=f"{split}-{number}", source=directory.name, text_bytes=text_bytes, metadata={})
        chunks.append(writer.close())
    quarantine = directory / store.QUARANTINE
    quarantine.write_bytes(b"")
    record = store.FileRecord(store.QUARANTINE, 0, store.file_checksum(quarantine))
    store.write_manifest(
        directory, tokenizer=tokenizer, settings={}, source={}, chunks=chunks, rejected={}, quarantine=record
    )
    return directory
