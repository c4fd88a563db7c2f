"""How fast and how complete the search for near duplicates is, beside brute force and beside datasketch.

In: documents as token arrays. Out: `Figures` of Blues and, for the same documents, of datasketch (the extra `dev`).

Speed is in bytes of source text for each second of processor time, so a number of threads does not flatter it. Recall
is over all pairs with a Jaccard index of at least `similarity`, which brute force finds without any hashing of sets.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from scipy import sparse

from blues.data import minhash
from blues.data.corpus import Corpus, Shelf
from blues.data.dedup import find_duplicates
from blues.data.minhash import Settings
from blues.data.sketches import Sketches
from blues.errors import DataError

SIMILARITY = 0.8
RUN_TOKENS = 1 << 22


@dataclass(frozen=True)
class Figures:
    """seconds: of processor time. pairs: similar ones by brute force; found: how many of them were candidates; left:
    how many still are there whole when the duplicates are removed (None where nothing is removed, as by datasketch)."""

    documents: int
    text_bytes: int
    seconds: float
    pairs: int
    found: int
    left: int | None

    @property
    def bytes_per_second(self) -> float:
        return self.text_bytes / self.seconds

    @property
    def recall(self) -> float:
        """Share of the similar pairs that are found; 1 without any."""
        return self.found / self.pairs if self.pairs else 1.0


def similar_pairs(documents: Sequence[np.ndarray], ngram: int, similarity: float) -> np.ndarray:
    """Brute force: all pairs of documents with at least this Jaccard index, int64[M, 2], the smaller number first.

    The intersections of all pairs are one product of the sparse matrix documents x shingles with its transpose.
    """
    sets = [minhash.shingle_set(document, ngram) for document in documents]
    sizes = np.array([len(shingles) for shingles in sets], dtype=np.int64)
    _, columns = np.unique(np.concatenate(sets), return_inverse=True)
    rows = np.concatenate(([0], np.cumsum(sizes)))
    has = sparse.csr_array((np.ones(len(columns), dtype=np.int32), columns, rows))
    common = sparse.triu(has @ has.T, k=1).tocoo()
    union = sizes[common.row] + sizes[common.col] - common.data
    pairs = np.stack((common.row, common.col), axis=1).astype(np.int64)[common.data / union >= similarity]
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def in_memory(documents: Sequence[np.ndarray]) -> Corpus:
    """A corpus of documents (uint32, without `<|endoftext|>`) that are not on disk."""
    end = np.zeros(1, dtype=np.uint32)
    flat = np.concatenate([part for document in documents for part in (document.astype(np.uint32), end)])
    ends_D = np.cumsum([len(document) + 1 for document in documents], dtype=np.int64)
    starts = (ends_D - [len(document) + 1 for document in documents]).tolist()
    digests = [xxhash.xxh3_64_intdigest(flat[a:b].data) for a, b in zip(starts, ends_D.tolist(), strict=True)]
    return Corpus([Shelf(0, "train", ends_D, np.array(digests, dtype=np.uint64), lambda a, b: flat[a:b])])


def measure(
    documents: Sequence[np.ndarray], text_bytes: int, settings: Settings, *, similarity: float = SIMILARITY
) -> Figures:
    """Time signatures, candidates and verification by Blues, and count the similar pairs that it finds.

    Args:
        documents: uint32 tokens of each, not empty, without `<|endoftext|>`. text_bytes: of all of them as UTF-8.
    """
    corpus = in_memory(documents)
    began = time.process_time()
    with Sketches.room_for(len(corpus), settings) as sketches:
        for run in corpus.runs(RUN_TOKENS):
            sketches.put(run.number, *run.sketch(corpus.shelves[0].read, settings))
        removal = find_duplicates(corpus, settings, sketches)
        seconds = time.process_time() - began
        one, other = similar_pairs(documents, settings.ngram, similarity).T
        found = int(np.count_nonzero(np.any(sketches.keys_BN[:, one] == sketches.keys_BN[:, other], axis=0)))
    goes = np.isin(np.arange(len(documents)), removal.numbers)
    left = int(np.count_nonzero(~goes[one] & ~goes[other]))
    return Figures(len(documents), text_bytes, seconds, len(one), found, left)


def measure_datasketch(
    documents: Sequence[np.ndarray], text_bytes: int, settings: Settings, *, similarity: float = SIMILARITY
) -> Figures:
    """The same by datasketch's MinHash and MinHashLSH, which propose candidates and do not verify them. It is given the
    hashes of the shingles ready made, so that its own hashing of bytes does not count.

    Raises:
        DataError: datasketch is not installed.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise DataError('datasketch is not installed; `pip install "blues[dev]"` brings it') from None
    began = time.process_time()
    index = MinHashLSH(threshold=settings.threshold, num_perm=settings.permutations)
    made = []
    for number, document in enumerate(documents):
        signature = MinHash(num_perm=settings.permutations, hashfunc=int)
        signature.update_batch((minhash.shingle_set(document, settings.ngram) & np.uint64(0xFFFF_FFFF)).tolist())
        index.insert(number, signature)
        made.append(signature)
    proposed = [set(index.query(signature)) for signature in made]
    seconds = time.process_time() - began
    pairs = similar_pairs(documents, settings.ngram, similarity)
    found = sum(other in proposed[one] for one, other in pairs.tolist())
    return Figures(len(documents), text_bytes, seconds, len(pairs), found, None)
