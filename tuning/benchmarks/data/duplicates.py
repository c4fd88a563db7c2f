"""What is measured of removing near duplicates. Every function runs in a process of its own.

In: `meter`, a store and files of arrays. Out: figures by name. The documents are real ones of a prepared corpus; to
know what should be found, copies are added with tokens changed at random, so that all similarities occur.

Shapes: T tokens of all documents end to end (each with its `<|endoftext|>`), D documents.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
from scipy import sparse

from blues.cluster.dedup import HERE_TOKENS, Request, dedup
from blues.data.dedup.minhash import Settings, shingle_set
from blues.data.storage.chunks import ChunkWriter
from blues.data.storage.store import Store
from blues.data.storage.versions import Draft, write_version

if TYPE_CHECKING:
    from tuning.benchmarks.worker import Meter

MB = 1e6
SETTINGS = Settings()
"""The defaults of `blues dedup`; the peer gets the same."""
SIMILARITY = 0.8
"""What must be found."""
MOST_CHANGED = 0.06
"""Of the tokens of a copy, at most: a Jaccard index of 5-grams of about 0.58 (0.023 gives 0.8)."""


def write_copies(meter: type[Meter], prepared: str, output: str, documents: int, copies: float, seed: int) -> dict:
    """A dataset of documents drawn from another, and of copies of a share of them; `tokens.npy` and `ends.npy` beside
    it hold the same for those who do not read datasets of Blues."""
    source, path, rng = Store.open(prepared), Path(output), np.random.default_rng(seed)
    total = source.num_documents("train")
    drawn = np.sort(rng.permutation(total)[:documents]).tolist()
    chosen = set(drawn)
    made: list[tuple[np.ndarray, int]] = []
    for number, document in enumerate(source.documents("train")):
        if number not in chosen:
            continue
        made.append((document.tokens, document.text_bytes))
        if rng.random() < copies and len(document.tokens) > 1:
            made.append((_changed(document.tokens, rng), document.text_bytes))
    made = [made[place] for place in rng.permutation(len(made))]
    writer = ChunkWriter(path, "train", 0)
    for number, (tokens, text_bytes) in enumerate(made):
        writer.add(tokens, id=str(number), source="copies", text_bytes=text_bytes, metadata={})
    draft = Draft(tokenizer=source.tokenizer, operation={"kind": "benchmark"}, chunks={"train": [writer.close()]})
    write_version(path, 1, draft)
    np.save(path / "tokens.npy", np.concatenate([tokens for tokens, _ in made]))
    np.save(path / "ends.npy", np.cumsum([len(tokens) for tokens, _ in made]))
    return {"documents": len(made), "bytes": sum(text_bytes for _, text_bytes in made)}


def _changed(tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A copy in which some tokens are others of the same document; the last one, `<|endoftext|>`, stays."""
    copy = tokens.copy()
    places = np.flatnonzero(rng.random(len(copy) - 1) < rng.uniform(0, MOST_CHANGED))
    copy[places] = rng.choice(tokens[:-1], size=len(places))
    return copy


def brute_force(meter: type[Meter], folder: str, output: str) -> dict:
    """All pairs of documents that are similar by the default settings: `pairs` int64[pairs, 2] and their Jaccard
    `index` in a file, by one product of the matrix documents x shingles with its transpose."""
    tokens_T, ends_D = np.load(Path(folder, "tokens.npy")), np.load(Path(folder, "ends.npy"))
    starts = np.concatenate(([0], ends_D[:-1])).tolist()
    with meter() as spent:
        sets = [shingle_set(tokens_T[a : b - 1], SETTINGS.ngram) for a, b in zip(starts, ends_D.tolist(), strict=True)]
        sizes = np.array([len(shingles) for shingles in sets], dtype=np.int64)
        shingles, columns = np.unique(np.concatenate(sets), return_inverse=True)
        rows = np.concatenate(([0], np.cumsum(sizes)))
        has = sparse.csr_array((np.ones(len(columns), dtype=np.int32), columns, rows), shape=(len(sets), len(shingles)))
        common = sparse.triu(has @ has.T, k=1).tocoo()
        index = common.data / (sizes[common.row] + sizes[common.col] - common.data)
        similar = index >= SETTINGS.threshold
        pairs = np.stack((common.row, common.col), axis=1)[similar].astype(np.int64)
    np.savez(output, pairs=pairs, index=index[similar])
    return {"s": spent.seconds, "pairs": int(np.count_nonzero(index >= SIMILARITY))}


def remove(meter: type[Meter], store: str, size: int) -> dict:
    """`blues dedup` with its default settings, in this process, up to the writing of the new version. size: bytes of
    text. Returns the numbers of the training documents that would go as `removed`."""
    with meter() as spent:
        found = dedup([store], Request(SETTINGS), dry_run=True)
    if found.summary is None:
        raise ValueError(f"the duplicates of {store} were removed before")
    removed = found.summary.removed.filter(pc.field("split") == "train")["document"].to_pylist()
    here = Store.open(store).num_tokens("train") < HERE_TOKENS // 2  # else Ray's processes may make the signatures
    cpu_s = spent.cpu_s if here else spent.whole_cpu_s
    rates = {"MB/s a core": None if cpu_s is None else size / MB / cpu_s, "MB/s": size / MB / spent.seconds}
    return rates | {"growth MB": spent.growth_mb, "removed": removed}
