"""Prepared datasets of given texts, written the way `blues prepare` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from blues.data.storage.chunks import ChunkWriter
from blues.data.tokenizer import Tokenizer
from tests.data.datasets import publish
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
        writer = ChunkWriter(directory, split, 0)
        for number, document in enumerate(documents):
            ids = built.encode(document) if isinstance(document, str) else document
            tokens = np.array([*ids, built.eot_id], dtype=np.uint32)
            text_bytes = len(built.decode_bytes(ids))
            writer.add(tokens, id=f"{split}-{number}", source=directory.name, text_bytes=text_bytes, metadata={})
        chunks.append(writer.close())
    return publish(directory, chunks, tokenizer)
