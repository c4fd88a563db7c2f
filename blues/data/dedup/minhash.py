"""Near-duplicate documents by MinHash: shingles, signatures, and the bands that make candidates of them.

In: token arrays. Out: for each document the keys of its bands (equal keys make a candidate pair) and its mark, one byte
of each place of its signature, which estimates similarity without reading the documents again.

A shingle is a run of `ngram` tokens; a shorter document is one shingle of all its tokens. The similarity of two
documents is the Jaccard index of their sets of shingles. Each place of a MinHash signature is equal in two documents
with that probability (Broder 1997). The signature is rensa's, which costs O(tokens) for any number of places: Fast
Similarity Sketching (Dahlgaard, Knudsen, Thorup 2017, arXiv:1704.04370).

Shapes: T tokens of a block of documents, D documents of it, P places of a signature, B bands.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash
from rensa import RMinHash

from blues.errors import ConfigError

NGRAM = 5
PERMUTATIONS = 128
THRESHOLD = 0.7
SEED = 20_241_128
RECALL = 0.95
"""The least probability with which a pair exactly at the threshold becomes a candidate."""
MARK_ERRORS = 4.0
"""Standard deviations below the threshold at which a pair is given up by its marks alone (3 of 100,000 at it)."""

_MULTIPLIER = np.uint64(0x9E37_79B9_7F4A_7C15)
_MIXER = np.uint64(0xBF58_476D_1CE4_E5B9)
_HALF = np.uint64(32)
_MARK_VALUES = 256


@dataclass(frozen=True)
class Bands:
    """How a signature is cut: `bands` runs of `rows` places each. A pair is a candidate if one whole run is equal."""

    bands: int
    rows: int

    def recall(self, similarity: float) -> float:
        """Probability that a pair of this similarity is a candidate: 1 - (1 - s**rows)**bands, the S-curve."""
        return 1.0 - (1.0 - similarity**self.rows) ** self.bands

    @classmethod
    def choose(cls, permutations: int, threshold: float) -> Bands:
        """The longest rows, and so the fewest useless candidates, with `recall(threshold) >= RECALL`.

        With 128 places the threshold 0.7 gives 25 bands of 5 (recall 0.990 at 0.7, 0.99995 at 0.8), and 0.8 gives 18
        bands of 7 (0.986 at 0.8, 0.99999 at 0.9).

        Raises:
            ConfigError: too few places for such a low threshold.
        """
        for rows in range(permutations, 0, -1):
            found = cls(permutations // rows, rows)
            if found.recall(threshold) >= RECALL:
                return found
        raise ConfigError(
            f"{permutations} permutations cannot find pairs of similarity {threshold}; use more, or a higher threshold"
        )


@dataclass(frozen=True)
class Settings:
    """What counts as a near duplicate: Jaccard index of token `ngram`s >= threshold, found with `permutations` places.

    Raises:
        ConfigError: a value outside its range.
    """

    threshold: float = THRESHOLD
    ngram: int = NGRAM
    permutations: int = PERMUTATIONS

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"threshold {self.threshold} is not a similarity; give a number in (0, 1], such as 0.7")
        if self.ngram < 1:
            raise ConfigError(f"ngram {self.ngram} is not a number of tokens; give 1 or more, such as 5")
        if not 1 <= self.permutations <= 4096:
            raise ConfigError(f"permutations {self.permutations} is outside 1 ... 4096; 128 suits most data")
        Bands.choose(self.permutations, self.threshold)

    @property
    def bands(self) -> Bands:
        """Chosen for the threshold."""
        return Bands.choose(self.permutations, self.threshold)

    @property
    def least_estimate(self) -> float:
        """A pair whose marks say less than this is not worth reading."""
        deviation = (self.threshold * (1 - self.threshold) / self.permutations) ** 0.5
        return self.threshold - MARK_ERRORS * deviation


def flat_shingles(tokens_T: np.ndarray, ends_D: np.ndarray, ngram: int) -> np.ndarray:
    """The hashes of the shingles of documents that lie end to end: uint64[T], a document's at the places of its tokens.

    The last `ngram - 1` places of a document repeat its last shingle, which changes no set.

    Args:
        tokens_T: uint32[T]. ends_D: int64[D], the exclusive end of each document; the last is T.
    """
    hashes_T = tokens_T.astype(np.uint64)
    rolled = _roll(hashes_T, ngram)
    if ngram > 1:
        hashes_T[: len(rolled)] = rolled
    starts_D = np.concatenate(([0], ends_D[:-1]))
    long = ends_D - starts_D >= ngram
    for back in range(1, ngram):
        hashes_T[ends_D[long] - back] = hashes_T[ends_D[long] - ngram]
    for start, end in zip(starts_D[~long].tolist(), ends_D[~long].tolist(), strict=True):
        hashes_T[start:end] = _short_shingle(tokens_T[start:end])
    return hashes_T


def _roll(tokens: np.ndarray, ngram: int) -> np.ndarray:
    """The hash of each run of `ngram` tokens: uint64[n] -> uint64[max(0, n - ngram + 1)], a polynomial modulo 2**64."""
    count = max(0, len(tokens) - ngram + 1)
    hashes = tokens[:count]
    for place in range(1, ngram):
        hashes = np.multiply(hashes, _MULTIPLIER, out=None if place == 1 else hashes)
        hashes += tokens[place : count + place]
    return hashes


def _short_shingle(tokens: np.ndarray) -> np.uint64:
    """The hash of a document that is a single shingle, apart from all longer shingles."""
    return np.uint64(xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens, dtype="<u4").data, seed=SEED))


def shingle_set(tokens: np.ndarray, ngram: int) -> np.ndarray:
    """The set of a document's shingles as sorted hashes without repetition: uint64[n], n >= 1.

    64 bits tell the shingles of a document apart for all practical purposes: two different ones are confused with a
    probability of about 2**-64.
    """
    if len(tokens) < ngram:
        return np.array([_short_shingle(tokens)])
    hashes = np.sort(_roll(tokens.astype(np.uint64), ngram))
    first = np.ones(len(hashes), dtype=bool)
    np.not_equal(hashes[1:], hashes[:-1], out=first[1:])
    return hashes[first]


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Size of the intersection over that of the union of two `shingle_set`s."""
    both = np.concatenate((left, right))
    both.sort(kind="stable")  # merges the two sorted runs
    common = int(np.count_nonzero(both[1:] == both[:-1]))
    return common / (len(both) - common)


def signatures(tokens_T: np.ndarray, ends_D: np.ndarray, ngram: int, permutations: int) -> np.ndarray:
    """MinHash signatures of documents that lie end to end: uint32[D, P]; all ones for an empty one."""
    offsets = np.concatenate(([0], ends_D)).astype(np.uint64)
    hashes_T = flat_shingles(tokens_T, ends_D, ngram)
    rows = RMinHash.digest_matrix_from_flat_token_hashes(hashes_T, offsets, permutations, SEED).to_rows()
    return np.array(rows, dtype=np.uint32).reshape(len(ends_D), permutations)


def band_keys(signatures_DP: np.ndarray, bands: Bands) -> np.ndarray:
    """One number for each band of each signature, equal where the whole band is equal: uint64[B, D]."""
    used = signatures_DP[:, : bands.bands * bands.rows].reshape(len(signatures_DP), bands.bands, bands.rows)
    keys_BD = np.zeros((bands.bands, len(signatures_DP)), dtype=np.uint64)
    for row in range(bands.rows):
        keys_BD += used[:, :, row].T
        keys_BD *= _MULTIPLIER
        keys_BD ^= keys_BD >> _HALF
    return keys_BD * _MIXER


def marks(signatures_DP: np.ndarray) -> np.ndarray:
    """The lowest byte of each place of the signatures (b-bit MinHash, Li and König 2010): uint8[D, P]."""
    return (signatures_DP & np.uint32(_MARK_VALUES - 1)).astype(np.uint8)


def estimate(left_NP: np.ndarray, right_NP: np.ndarray) -> np.ndarray:
    """Estimated similarity of pairs by their marks: float64[N]. Unequal places agree by chance once in 256."""
    agreement = np.count_nonzero(left_NP == right_NP, axis=1) / left_NP.shape[1]
    return (agreement * _MARK_VALUES - 1.0) / (_MARK_VALUES - 1.0)
