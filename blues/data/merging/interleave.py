"""In which order the documents of several datasets stand in one, and where its shards are cut: plain arithmetic.

In: the lengths of each source's documents, weights as exact fractions, a seed. Out: a list of documents (PICK_TYPE) in
which the shares of the tokens follow the weights from the first document to the last.

Each source's documents are put in a keyed permutation. If tokens came evenly, a source of weight w would have w t of
the first t tokens; a document whose source has `before` tokens ahead of it and which is `length` long is centred at
t = (before + length / 2) / w. Documents are sorted by that time. At each time the tokens of a source so differ from w t
by at most half a document, and at every prefix of n tokens its own share differs from w by at most

    ((1 - w) m + w (the sum of the other sources' m)) / 2n,    m: the longest document of a source

which is one longest document / n or less for up to three sources, whatever their weights.

Legend: k sources, d documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import xxhash

from blues.data.mixture.schedule import permute_all, shares_of

PICK_TYPE = np.dtype([("source", "<i4"), ("pass", "<i4"), ("document", "<i8"), ("tokens", "<i8")])
"""A document of the output: number of its source, how often the source was used up before, number within its split of
the source, tokens (`<|endoftext|>` included)."""


def in_order(lengths: Sequence[np.ndarray]) -> np.ndarray:
    """All documents of all sources once, source after source: PICK_TYPE[d]."""
    return np.concatenate([_picks(s, np.arange(len(own)), own) for s, own in enumerate(lengths)])


def interleave(
    lengths: Sequence[np.ndarray],
    weights: Sequence[Fraction],
    keys: Sequence[str],
    *,
    seed: int = 0,
    tokens: int | None = None,
) -> np.ndarray:
    """Documents in the order of the mixture: PICK_TYPE[d].

    Args:
        lengths: tokens of each source's documents: k times int64[d_s].
        weights: with a common denominator up to `schedule.MAX_PERIOD`; sources without weight give nothing.
        keys: what tells the content of the sources apart; with the seed it decides the permutations.
        tokens: about how many to take, 1 or more, within half a document of each source. None: as many as there are
            until a source is used up, so that nothing comes twice. A source that is used up before starts over, in
            another permutation.
    """
    shares, sizes = shares_of(weights), [int(own.sum()) for own in lengths]
    size = min(Fraction(n * sum(shares), share) for n, share in zip(sizes, shares, strict=True) if share)
    end = size if tokens is None else Fraction(tokens)
    picks, times = [], []
    for source, (own, share, key) in enumerate(zip(lengths, shares, keys, strict=True)):
        if share:
            taken, centres = _until(source, own, 2 * end * share / sum(shares), f"{seed}:{source}:{key}")
            picks.append(taken)
            times.append(centres / share)  # whole numbers below 2**53: rounded in the division alone
    return np.concatenate(picks)[np.argsort(np.concatenate(times), kind="stable")]


def _until(source: int, lengths: np.ndarray, last: Fraction, key: str) -> tuple[np.ndarray, np.ndarray]:
    """A source's documents in order, pass after pass, whose centres are not past `last`; and their centres. Both count
    half tokens of this source, so that they are whole: int64[d]."""
    total = int(lengths.sum())
    passes = max(1, -(-int(last) // (2 * total)))
    picks = []
    for number in range(passes):
        permutation = _permutation(len(lengths), f"{key}:{number}")
        picks.append(_picks(source, permutation, lengths[permutation], number))
    taken = np.concatenate(picks)
    centres = 2 * np.cumsum(taken["tokens"]) - taken["tokens"]
    count = int(np.searchsorted(centres, int(last), side="right"))
    return taken[:count], centres[:count]


def _permutation(size: int, key: str) -> np.ndarray:
    keys = np.full(size, xxhash.xxh3_64_intdigest(key.encode()), dtype=np.uint64)
    return permute_all(np.arange(size), size, keys)


def _picks(source: int, documents: np.ndarray, tokens: np.ndarray, number: int = 0) -> np.ndarray:
    picks = np.empty(len(documents), dtype=PICK_TYPE)
    picks["source"], picks["pass"], picks["document"], picks["tokens"] = source, number, documents, tokens
    return picks


def cut(tokens: np.ndarray, shard_tokens: int) -> list[slice]:
    """Shards of about `shard_tokens`: each document goes to the shard in which its first token falls. The documents
    have these lengths; a shard that would be empty is none."""
    starts = np.cumsum(tokens) - tokens
    heads = np.flatnonzero(np.diff(starts // shard_tokens, prepend=-1))
    bounds = [*heads.tolist(), len(tokens)]
    return [slice(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


def achieved_shares(picks: np.ndarray, sources: int) -> list[float]:
    """The share of each source in the tokens of these documents."""
    counts = np.bincount(picks["source"], weights=picks["tokens"], minlength=sources)
    return (counts / max(1.0, counts.sum())).tolist()
