"""What a dataset holds, in numbers: lengths, vocabulary, and documents that are in it more than once.

In: lengths and digests of documents, counts of tokens. Out: `Statistics` of one split of one source, and `Overlap`
between all of them.

Legend: D documents, V ids of the vocabulary, S splits of sources, U digests that are there more than once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blues.data.storage.checking import Documents
from blues.data.tokenizer import Tokenizer

TOP_TOKENS = 20
COVERAGE_POINTS = 40


@dataclass(frozen=True)
class TopToken:
    """A frequent token: its id, what it says, how often it occurs."""

    id: int
    text: str
    count: int


@dataclass(frozen=True)
class Lengths:
    """Lengths of documents in tokens, the `<|endoftext|>` of each included. bins: how many are of 2**k to
    2**(k + 1) - 1 tokens, for k from 0."""

    mean: float
    median: float
    p95: float
    longest: int
    bins: tuple[int, ...]

    @classmethod
    def of(cls, length_D: np.ndarray) -> Lengths:
        """Of int64[D]."""
        if not len(length_D):
            return cls(0.0, 0.0, 0.0, 0, ())
        median, p95 = np.percentile(length_D, [50, 95]).tolist()
        return cls(float(length_D.mean()), median, p95, int(length_D.max()), histogram(length_D))


@dataclass(frozen=True)
class Statistics:
    """One split of one source.

    weight: the source's share of the training samples. used_ids: distinct ids that occur, of `vocabulary`. entropy: of
    the frequencies of ids, in bits per token. coverage: (n, the share of all tokens that are one of the n most frequent
    ids), n rising. duplicates: documents whose tokens equal those of an earlier one, of this or of another split or
    source.
    """

    source: str
    split: str
    weight: float
    documents: int
    tokens: int
    text_bytes: int
    lengths: Lengths
    used_ids: int
    vocabulary: int
    entropy: float
    top_tokens: tuple[TopToken, ...]
    coverage: tuple[tuple[int, float], ...]
    duplicates: int = 0

    @property
    def bytes_per_token(self) -> float:
        """Of text, the `<|endoftext|>` of each document left out; 0 without tokens."""
        return self.text_bytes / max(1, self.tokens - self.documents)


@dataclass(frozen=True)
class Overlap:
    """Documents with equal tokens, between splits of sources: `names` are (source, split), of S.

    shared: S x S, how many documents of the row are in the column too; on the diagonal, how many are copies of an
    earlier one in the same. duplicates: S, copies of any earlier one, rows in order. leaked: S, training documents
    that are in any validation split; 0 for validation.
    """

    names: tuple[tuple[str, str], ...]
    shared: tuple[tuple[int, ...], ...]
    duplicates: tuple[int, ...]
    leaked: tuple[int, ...]


def describe(
    name: str, split: str, weight: float, documents: Documents, counts_V: np.ndarray, tokenizer: Tokenizer
) -> Statistics:
    """The numbers of one split, but for its duplicates, which take all splits to see. counts_V: int64[V]."""
    ranked = np.argsort(-counts_V, kind="stable")[:TOP_TOKENS].tolist()
    return Statistics(
        source=name,
        split=split,
        weight=weight,
        documents=len(documents.lengths),
        tokens=int(documents.lengths.sum()),
        text_bytes=int(documents.text_bytes.sum()),
        lengths=Lengths.of(documents.lengths),
        used_ids=int(np.count_nonzero(counts_V)),
        vocabulary=len(counts_V),
        entropy=entropy(counts_V),
        top_tokens=tuple(
            TopToken(token, tokenizer.decode([token]), int(counts_V[token])) for token in ranked if counts_V[token]
        ),
        coverage=coverage(counts_V),
    )


def histogram(length_D: np.ndarray) -> tuple[int, ...]:
    """How many lengths fall into [2**k, 2**(k + 1)), for k from 0 to the last that is needed."""
    _, exponent_D = np.frexp(length_D.astype(np.float64))  # length = m * 2**exponent with m in [0.5, 1)
    return tuple(np.bincount(exponent_D[length_D > 0] - 1).tolist())


def entropy(counts_V: np.ndarray) -> float:
    """Bits per token of the frequencies: what a model that knows only them needs."""
    share = counts_V[counts_V > 0] / max(1, int(counts_V.sum()))
    return float(-(share * np.log2(share)).sum()) + 0.0


def coverage(counts_V: np.ndarray) -> tuple[tuple[int, float], ...]:
    """(n, share of the n most frequent ids), for n on a logarithmic scale up to the number of ids that occur."""
    ranked = np.sort(counts_V[counts_V > 0])[::-1]
    if not len(ranked):
        return ()
    shares = np.cumsum(ranked) / int(ranked.sum())
    points = np.unique(np.geomspace(1, len(ranked), COVERAGE_POINTS).round().astype(np.int64))
    return tuple((n, float(shares[n - 1])) for n in points.tolist())


def overlap(names: Sequence[tuple[str, str]], digests: Sequence[np.ndarray]) -> Overlap:
    """Which documents are in which of S splits. digests: uint64[documents] of each, in order."""
    from scipy import sparse

    everything, count = np.concatenate([np.zeros(0, np.uint64), *digests]), len(names)
    ordered = np.sort(everything)
    repeated_U = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])  # most documents are there once: they end here
    if not len(repeated_U):
        return Overlap(tuple(names), ((0,) * count,) * count, (0,) * count, (0,) * count)
    kind_D = np.minimum(np.searchsorted(repeated_U, everything), len(repeated_U) - 1)
    kept = repeated_U[kind_D] == everything
    kind_D, row_D = kind_D[kept], np.repeat(np.arange(count), [len(digest) for digest in digests])[kept]
    counts_SU = sparse.csr_array((np.ones(len(row_D), np.int64), (row_D, kind_D)), shape=(count, len(repeated_U)))
    counts_SU.sum_duplicates()
    present_SU = counts_SU.astype(bool).astype(np.int64)
    documents_S, shared_SS = np.bincount(row_D, minlength=count), (counts_SU @ present_SU.T).toarray()
    np.fill_diagonal(shared_SS, documents_S - present_SU.sum(axis=1))
    first = np.unique(kind_D, return_index=True)[1]
    is_held_out_S = np.array([split == "validation" for _, split in names])
    held_out_U = np.zeros(len(repeated_U), dtype=bool)
    held_out_U[kind_D[is_held_out_S[row_D]]] = True
    leaked_S = np.bincount(row_D[held_out_U[kind_D]], minlength=count) * ~is_held_out_S
    return Overlap(
        names=tuple(names),
        shared=tuple(tuple(row) for row in shared_SS.tolist()),
        duplicates=tuple((documents_S - np.bincount(row_D[first], minlength=count)).tolist()),
        leaked=tuple(leaked_S.tolist()),
    )
