"""Training batches from a prepared dataset or a mixture: a pure function from a sample index to its tokens.

In: a dataset directory, a sequence length, a seed. Out: `Mixture.sample(index)` for every index >= 0, the same on any
machine and for any number of ranks, so that resuming needs no state but the step.

- Which source: Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32, 1980). At every prefix
  of N samples, source s was drawn w_s N times, give or take less than one. Not random, so no run is unlucky.
- Which window: a source is its tokens end to end, cut into windows of T + 1 tokens that overlap by one. Each pass over
  a source visits all its windows once, in the order of a keyed permutation (a Feistel network with cycle walking:
  Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), with a key of its own for every pass.

Legend: B samples of a batch, T sequence length.
"""

from __future__ import annotations

import functools
import heapq
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from queue import Empty, Full, Queue
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from blues import config as cfg
from blues.data import merge
from blues.data import tokenizer as tok
from blues.errors import ConfigError, DataError

# Weights whose common denominator is larger are rounded to this one: the schedule of one period is kept in memory.
MAX_PERIOD = 1 << 16
FEISTEL_ROUNDS = 6
MASK = (1 << 64) - 1


class Sample(NamedTuple):
    """One window: tokens int64[T + 1] (inputs are all but the last, targets all but the first); its source's number."""

    tokens: torch.Tensor
    source: int


class Batch(NamedTuple):
    """Some windows: tokens int64[B, T + 1], sources int64[B]."""

    tokens: torch.Tensor
    sources: torch.Tensor


class Mixture(cfg.Configurable):
    """Random access to the samples of one split of a dataset."""

    @cfg.configclass
    class Config(cfg.Config):
        """`path` is a directory made by `blues prepare` or `blues merge`; `sequence_length` is T, in tokens."""

        path: str = ""
        sequence_length: int = 2048
        seed: int = 0
        tokenizer: tok.Tokenizer.Config = tok.Tokenizer.Config()

        def __post_init__(self) -> None:
            if self.sequence_length < 1:
                raise ConfigError(f"sequence_length: {self.sequence_length} must be at least 1")

    config: Config

    def __init__(self, config: Config, *, split: str = "train") -> None:
        """Open the dataset.

        Raises:
            DataError: no path, a damaged dataset, another tokenizer, or a source too small for one window.
        """
        if not config.path:
            raise DataError("no dataset: name one with --data-cache-dir DIR (or data.path=DIR)")
        self.config, self.split = config, split
        self.dataset = merge.open_dataset(config.path)
        self._check_tokenizer()
        self.source_names = list(self.dataset.names)
        self.num_windows = [
            max(0, store.num_tokens(split) - 1) // config.sequence_length for store in self.dataset.stores
        ]
        self._shares = period_shares(self.dataset.weights)
        self._check_sizes()
        self._schedule = chairman_schedule(self._shares)
        self._ranks = _rank_within_source(self._schedule, len(self._shares))

    @property
    def weights(self) -> list[float]:
        """Share of each source among the samples; sums to 1."""
        period = sum(self._shares)
        return [share / period for share in self._shares]

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything `sample` depends on, apart from the split and the path."""
        parts = [self.dataset.fingerprint, self._shares, self.config.sequence_length, self.config.seed]
        return xxhash.xxh3_64_hexdigest(repr(parts).encode())

    @property
    def num_samples_per_epoch(self) -> int:
        """As many samples as there are windows in all sources: one pass over the data if weights are proportional."""
        return sum(self.num_windows)

    def source_of(self, index: int) -> int:
        """Number of the source that sample `index` comes from."""
        return int(self._schedule[index % len(self._schedule)])

    def window_of(self, index: int) -> tuple[int, int]:
        """(source, window) of sample `index`, an integer >= 0."""
        period, position = divmod(index, len(self._schedule))
        source = int(self._schedule[position])
        draw = period * self._shares[source] + int(self._ranks[position])
        epoch, place = divmod(draw, self.num_windows[source])
        # What is held out is the same for every seed: runs with other seeds are measured on the same windows.
        seed = self.config.seed if self.split == "train" else 0
        key = f"{seed}:{self.dataset.stores[source].fingerprint}:{self.split}:{epoch}"
        return source, permute(place, self.num_windows[source], xxhash.xxh3_64_intdigest(key.encode()))

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0; there is no last one: a source that is used up starts over in another order."""
        if index < 0:
            raise IndexError(f"sample {index}: indices start at 0")
        source, window = self.window_of(index)
        length = self.config.sequence_length
        tokens = self.dataset.stores[source].read(self.split, window * length, window * length + length + 1)
        return Sample(torch.from_numpy(tokens.astype(np.int64)), source)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples of `indices`, stacked."""
        samples = [self.sample(index) for index in indices]
        return Batch(
            torch.stack([sample.tokens for sample in samples]),
            torch.tensor([sample.source for sample in samples], dtype=torch.int64),
        )

    def prefetch(self, index_lists: Iterable[Sequence[int]], depth: int = 2) -> Iterator[Batch]:
        """`batch(indices)` for each element of `index_lists`, read up to `depth` batches ahead in a thread.

        An error while reading is raised at the batch it belongs to. Closing the iterator ends the thread.
        """
        queue: Queue[Batch | BaseException | None] = Queue(maxsize=max(1, depth))
        stop = threading.Event()
        thread = threading.Thread(target=self._read_ahead, args=(index_lists, queue, stop), daemon=True)
        thread.start()
        try:
            while (item := queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            while thread.is_alive():  # make room so that a waiting put can see the end
                try:
                    queue.get_nowait()
                except Empty:
                    thread.join(timeout=0.05)

    def _read_ahead(self, index_lists: Iterable[Sequence[int]], queue: Queue, stop: threading.Event) -> None:
        def put(item: Batch | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    return queue.put(item, timeout=0.1)
                except Full:
                    continue

        try:
            for indices in index_lists:
                if stop.is_set():
                    return
                put(self.batch(indices))
            put(None)
        except BaseException as error:  # handed to the reader, who raises it
            put(error)

    def _check_tokenizer(self) -> None:
        asked = tok.fingerprint(self.config.tokenizer)
        for name, store in zip(self.dataset.names, self.dataset.stores, strict=True):
            if store.manifest["tokenizer"]["fingerprint"] == asked:
                continue
            found = store.tokenizer.vocab_size
            wanted = self.config.tokenizer.vocab_size
            if found == wanted:
                raise DataError(
                    f"dataset {name!r} was prepared with another release of the tokenizer; prepare it again"
                )
            raise DataError(
                f"dataset {name!r} was prepared with vocab_size {_size(found)} and data.tokenizer.vocab_size is "
                f"{_size(wanted)}; set data.tokenizer.vocab_size={_size(found)}, or prepare the dataset again with "
                + (f"--vocab-size {wanted}" if wanted is not None else "the whole vocabulary (no --vocab-size)")
            )

    def _check_sizes(self) -> None:
        for name, store, windows, share in zip(
            self.source_names, self.dataset.stores, self.num_windows, self._shares, strict=True
        ):
            if share == 0 or windows > 0:
                continue
            raise DataError(
                f"the {self.split} split of dataset {name!r} holds {store.num_tokens(self.split):,} tokens, too few "
                f"for one sequence of {self.config.sequence_length:,} + 1; lower data.sequence_length, or prepare it "
                f"with more {'input' if self.split == 'train' else 'input or a larger --validation-fraction'}"
            )


def rank_indices(
    step: int, micro_step: int, rank: int, world_size: int, micro_batch_size: int, global_batch_size: int
) -> list[int]:
    """The sample indices of one rank in one micro step; together the ranks and micro steps of `step` (from 0) cover
    `[step * global_batch_size, (step + 1) * global_batch_size)` exactly once, for any world size that divides it.

    Raises:
        ConfigError: the global batch is not a whole number of micro batches of all ranks.
    """
    stride = world_size * micro_batch_size
    if min(world_size, micro_batch_size, global_batch_size) < 1 or global_batch_size % stride:
        raise ConfigError(
            f"global_batch_size: {global_batch_size} is not a multiple of {world_size} workers x micro_batch_size "
            f"{micro_batch_size} = {stride}"
        )
    if not 0 <= micro_step < global_batch_size // stride or not 0 <= rank < world_size:
        raise IndexError(f"micro step {micro_step} of {global_batch_size // stride}, rank {rank} of {world_size}")
    start = step * global_batch_size + (micro_step * world_size + rank) * micro_batch_size
    return list(range(start, start + micro_batch_size))


def period_shares(weights: Sequence[Fraction]) -> list[int]:
    """Whole draws of each source in one period of the schedule: exactly in proportion to `weights` if their common
    denominator is at most MAX_PERIOD, else the nearest shares of MAX_PERIOD draws (largest remainders; no positive
    weight becomes zero)."""
    total = sum(weights)
    exact = [Fraction(weight) / total for weight in weights]
    period = math.lcm(*(weight.denominator for weight in exact))
    if period <= MAX_PERIOD:
        return [int(weight * period) for weight in exact]
    shares = [max(int(weight * MAX_PERIOD), int(weight > 0)) for weight in exact]
    remainders = [weight * MAX_PERIOD - share for weight, share in zip(exact, shares, strict=True)]
    while (missing := MAX_PERIOD - sum(shares)) != 0:
        sign = 1 if missing > 0 else -1
        candidates = [s for s, share in enumerate(shares) if sign > 0 or share > 1]
        chosen = max(candidates, key=lambda s: sign * remainders[s])
        shares[chosen] += sign
        remainders[chosen] -= sign
    return shares


def chairman_schedule(shares: Sequence[int]) -> np.ndarray:
    """int32[period]: the source of each draw, with |draws of s among the first n - n shares[s] / period| < 1.

    Tijdeman's rule as earliest deadline first: with k sources and a slack of 1/(2k - 2), draw j of a source may happen
    once its ideal count reaches j + slack and must before it exceeds j + 1 - slack + 1 draw. Runs in O(period log k).
    """
    period, active = sum(shares), [s for s, share in enumerate(shares) if share > 0]
    if len(active) == 1:
        return np.full(1, active[0], dtype=np.int32)
    parts = 2 * len(active) - 2
    waiting: list[tuple[int, int, int]] = []  # (first allowed draw, source, j)
    ready: list[tuple[int, int, int]] = []  # (last allowed draw, source, j)

    def plan(source: int, j: int) -> None:
        first = -(-(j * parts + 1) * period // (parts * shares[source]))
        heapq.heappush(waiting, (first, source, j))

    for source in active:
        plan(source, 0)
    schedule = np.empty(period, dtype=np.int32)
    for n in range(1, period + 1):
        while waiting and waiting[0][0] <= n:
            _, source, j = heapq.heappop(waiting)
            last = ((j + 1) * parts - 1) * period // (parts * shares[source]) + 1
            heapq.heappush(ready, (last, source, j))
        _, source, j = heapq.heappop(ready)
        schedule[n - 1] = source
        plan(source, j + 1)
    return schedule


def permute(place: int, size: int, key: int) -> int:
    """Where a keyed permutation of `[0, size)` sends `place`: a Feistel network over the next even power of two, walked
    until it lands inside (at most four steps in the mean)."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = place
    while True:
        left, right = value >> half, value & mask
        for round in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(right + ((key + round * 0x9E3779B97F4A7C15) & MASK)) & mask)
        value = left << half | right
        if value < size:
            return value


def _mix(value: int) -> int:
    """The finalizer of splitmix64."""
    value &= MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def _rank_within_source(schedule: np.ndarray, num_sources: int) -> np.ndarray:
    """int64[period]: how many earlier draws of the period have the same source."""
    ranks = np.empty(len(schedule), dtype=np.int64)
    for source in range(num_sources):
        places = np.flatnonzero(schedule == source)
        ranks[places] = np.arange(len(places))
    return ranks


def _size(vocab_size: int | None) -> str:
    return "null" if vocab_size is None else str(vocab_size)
