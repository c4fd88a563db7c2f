"""Training batches from a prepared dataset or a mixture: a pure function from a sample's index to its tokens.

In: a dataset directory, a sequence length, a seed. Out: `Mixture.batch(indices)` for any indices >= 0, the same on any
machine and for any number of ranks, so that resuming needs no state but the step.

The index gives the source and its draw (`schedule`: weights hold at every prefix, and may change in the
middle of a run), the draw a window (each pass over a source visits all its windows once, in an order of its own), and
the window its tokens (`packing`). Reading ahead (`prefetch`) changes nothing but the time.

Legend: n indices, B samples of a batch, T sequence length.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from blues import config as cfg
from blues.data import tokenizer as tok
from blues.data.merging import merge
from blues.data.mixture.languages import Languages
from blues.data.mixture.packing import Packing, Stream
from blues.data.mixture.prefetch import read_ahead
from blues.data.mixture.schedule import Schedule, Stretch, permute_all, round_weights, shares_of
from blues.errors import ConfigError, DataError

PLANNED_SAMPLES = 1 << 10
"""When reading ahead, the windows of so many samples are found at a time: it costs hardly more than those of eight."""


class Batch(NamedTuple):
    """Some samples."""

    inputs: Tensor
    """int64[B, T]."""
    targets: Tensor
    """int64[B, T]: the token after each input; -100 where the input is padding."""
    sources: Tensor
    """int64[B]: the number of the source of each sample."""
    documents: Tensor | None
    """int32[B, T]: equal where two inputs of a row are of the same document; None if attention may cross documents."""
    languages: Tensor | None = None
    """int64[B, T]: the number of the language of each input's document, 0 if unknown; None if they are not read."""

    def to(self, device: torch.device) -> Batch:
        """On a device; from pinned memory the copy runs beside the computation."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """In page-locked memory of the current CUDA device."""
        return self._map(Tensor.pin_memory)

    def cut(self, length: int) -> Batch:
        """Rows of `length` tokens, which divides T: each row becomes T / length of its own, in their order."""
        pieces = self.inputs.shape[1] // length
        rows = self._map(lambda tensor: tensor.reshape(-1, length) if tensor.ndim == 2 else tensor)
        return rows._replace(sources=self.sources.repeat_interleave(pieces))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        documents = None if self.documents is None else function(self.documents)
        languages = None if self.languages is None else function(self.languages)
        return Batch(function(self.inputs), function(self.targets), function(self.sources), documents, languages)


@cfg.configclass
class Phase(cfg.Config):
    """From sample `start` of the run on (counted over all workers: update x global batch size), sources are drawn with
    these weights, one for each source of the dataset in its order, on any scale. 0 pauses a source. Weights with a
    common denominator above 65,536 are rounded to it."""

    start: int
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.start < 0:
            raise ConfigError(f"start: {self.start} must be a sample's index, 0 or more")
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights) or not any(self.weights):
            raise ConfigError(f"weights: {list(self.weights)} must be zero or positive numbers, at least one positive")


class Mixture(cfg.Configurable):
    """Random access to the samples of one split of a dataset."""

    @cfg.configclass
    class Config(cfg.Config):
        """What is read, and in what order.

        path: a directory made by `blues prepare` or `blues merge`. sequence_length: T, in tokens. packing: how
        documents become sequences of that length. isolate_documents: whether attention stays within each document.
        languages: whether batches say the language of each token, from the metadata `language` of its document.
        phases: changes of the dataset's weights in the course of training, by rising start; each source goes on where
        it stood. They may change between two starts of a run, from the sample it has come to. max_cached_batches:
        batches that wait ready in each worker, 0 to read each when it is asked for. pin_memory: read into page-locked
        memory; `auto` where training runs on CUDA.
        """

        path: str = ""
        sequence_length: int = 2048
        seed: int = 0
        tokenizer: tok.Tokenizer.Config = tok.Tokenizer.Config()
        packing: Packing.Config = Stream.Config()
        isolate_documents: bool = False
        languages: bool = False
        phases: tuple[Phase, ...] = ()
        max_cached_batches: int = 8
        pin_memory: bool | Literal["auto"] = "auto"

        def __post_init__(self) -> None:
            if self.sequence_length < 1:
                raise ConfigError(f"sequence_length: {self.sequence_length} must be at least 1")
            if self.max_cached_batches < 0:
                raise ConfigError(f"max_cached_batches: {self.max_cached_batches} must be at least 0")
            for number, (phase, following) in enumerate(zip(self.phases, self.phases[1:], strict=False)):
                if phase.start >= following.start:
                    raise ConfigError(
                        f"phases[{number + 1}].start: {following.start} must be above that of the phase before, "
                        f"{phase.start}"
                    )

    config: Config

    def __init__(self, config: Config, *, split: str = "train") -> None:
        """Open the dataset, and plan its windows.

        Raises:
            DataError: no path, a damaged dataset, another tokenizer, a source too small for one window, or languages
                are wanted and no document has one.
            ConfigError: phases that do not fit the sources.
        """
        if not config.path:
            raise DataError("no dataset: name one with --data-cache-dir DIR (or data.path=DIR)")
        self.config, self.split = config, split
        self.dataset = merge.open_dataset(config.path)
        self._check_tokenizer()
        self.source_names = list(self.dataset.names)
        self._stretches = self._plan_stretches()
        packing: Packing = config.packing.build()
        self._windows = [packing.pack(store, split, config.sequence_length) for store in self.dataset.stores]
        self.num_windows = [windows.num_windows for windows in self._windows]
        self._check_sizes()
        self._schedule = Schedule(self._stretches)
        self._languages = Languages(self.dataset.stores, split) if config.languages else None

    @property
    def language_names(self) -> tuple[str, ...]:
        """Of the numbers in `Batch.languages`: 0 is "unknown". Empty if they are not read."""
        return () if self._languages is None else self._languages.names

    def weights_at(self, index: int = 0) -> list[float]:
        """Share of each source among the samples around `index`; sums to 1."""
        shares = [stretch.shares for stretch in self._stretches if stretch.start <= index][-1]
        return [share / sum(shares) for share in shares]

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any token of any sample; not with the path, nor with the split."""
        return self._fingerprint(self._stretches)

    def fingerprint_until(self, index: int) -> str:
        """Like `fingerprint`, of the samples before `index` alone: phases that start there or later leave it as it is.

        For as long as a run has read no further, it may go on with any data that have the same one."""
        return self._fingerprint([stretch for stretch in self._stretches if stretch.start < max(1, index)])

    @property
    def num_samples_per_epoch(self) -> int:
        """As many samples as there are windows in all sources: one pass over the data if weights are proportional."""
        return sum(self.num_windows)

    def windows_of(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and window of each sample: int64[n], int64[n].

        There is no last sample: a source that is used up starts over in another order.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and indices.min() < 0:
            raise IndexError(f"sample {indices.min()}: indices start at 0")
        sources, draws = self._schedule.draws(indices)
        windows = np.empty_like(draws)
        for source in np.unique(sources).tolist():
            here = np.flatnonzero(sources == source)
            epochs, places = np.divmod(draws[here], self.num_windows[source])
            different, which = np.unique(epochs, return_inverse=True)
            keys = np.array([self._key(source, epoch) for epoch in different.tolist()], dtype=np.uint64)
            windows[here] = permute_all(places, self.num_windows[source], keys[which])
        return sources, windows

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """The samples of these indices, in their order."""
        return self.read(*self.windows_of(indices))

    def read(self, sources: NDArray[np.int64], windows: NDArray[np.int64]) -> Batch:
        """These windows of these sources, int64[B] each, in their order."""
        shape = (len(sources), self.config.sequence_length)
        inputs, targets = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        documents = np.empty(shape, dtype=np.int32) if self.config.isolate_documents else None
        languages = None if self._languages is None else np.empty(shape, dtype=np.int64)
        present = np.unique(sources).tolist()
        for source in present:
            rows = slice(None) if len(present) == 1 else np.flatnonzero(sources == source)
            self._windows[source].fill(windows[rows], rows, inputs, targets, documents)
            if languages is not None and self._languages is not None:
                languages[rows] = self._languages.read(source, windows[rows], self._windows[source], shape[1])
        return Batch(
            torch.from_numpy(inputs),
            torch.from_numpy(targets),
            torch.from_numpy(sources),
            None if documents is None else torch.from_numpy(documents),
            None if languages is None else torch.from_numpy(languages),
        )

    def pieces_of(self, index: int) -> tuple[int, NDArray[np.int64]]:
        """The source of a sample, and where in its split its targets lie: int64[m, 2], see `Windows.pieces`."""
        sources, windows = self.windows_of([index])
        return int(sources[0]), self._windows[int(sources[0])].pieces(int(windows[0]))

    def num_targets(self, indices: Sequence[int] | NDArray[np.int64]) -> int:
        """Targets that are not padding in these samples together; reads no tokens."""
        if not any(windows.padded for windows in self._windows):
            return len(indices) * self.config.sequence_length
        sources, windows = self.windows_of(indices)
        return sum(
            int(self._windows[source].num_targets(windows[sources == source]).sum())
            for source in np.unique(sources).tolist()
        )

    def prefetch(
        self, index_lists: Iterable[Sequence[int]], device: torch.device | None = None
    ) -> Generator[Batch, None, None]:
        """`batch(indices)` for each element of `index_lists`, read ahead in a thread as the configuration says.

        `device`: where the batches will be used; for CUDA they come in pinned memory, unless pin_memory is false.
        An error while reading is raised at the batch it belongs to. Closing the generator ends the thread.

        Raises:
            ConfigError: pin_memory is true and there is no CUDA.
        """
        on_cuda = device is not None and device.type == "cuda"
        pinned = on_cuda if self.config.pin_memory == "auto" else self.config.pin_memory
        if pinned and not torch.cuda.is_available():
            raise ConfigError("data.pin_memory=true needs CUDA, and there is none here; set data.pin_memory=auto")
        own = torch.cuda.current_device() if pinned else None

        def load(plan: tuple[NDArray[np.int64], NDArray[np.int64]]) -> Batch:
            batch = self.read(*plan)
            if not pinned:
                return batch
            with torch.cuda.device(own):  # every thread has a current device of its own, at first number 0
                return batch.pin()

        return read_ahead(load, self._plan(index_lists), self.config.max_cached_batches)

    def _plan(self, index_lists: Iterable[Sequence[int]]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """`windows_of` each list."""
        for group in _grouped(index_lists, PLANNED_SAMPLES):
            sources, windows = self.windows_of(np.concatenate(group))
            borders = np.cumsum([len(indices) for indices in group])[:-1]
            yield from zip(np.split(sources, borders), np.split(windows, borders), strict=True)

    def _key(self, source: int, epoch: int) -> int:
        # What is held out is the same for every seed: runs with other seeds are measured on the same windows.
        seed = self.config.seed if self.split == "train" else 0
        return _order_key(seed, self.dataset.stores[source].fingerprint, self.split, epoch)

    def _fingerprint(self, stretches: Sequence[Stretch]) -> str:
        parts = [
            [store.fingerprint for store in self.dataset.stores],
            [(stretch.start, stretch.shares) for stretch in stretches],
            self.config.sequence_length,
            self.config.seed,
            cfg.dump(self.config.packing),
        ]
        return xxhash.xxh3_64_hexdigest(repr(parts).encode())

    def _plan_stretches(self) -> list[Stretch]:
        """The dataset's own weights, and those of the phases. What is held out keeps the dataset's own throughout."""
        try:
            stretches = [Stretch(0, shares_of(self.dataset.weights))]
        except ValueError as error:
            raise DataError(f"{self.config.path!r} has {error}; merge again, which rounds them") from None
        if self.split != "train":
            return stretches
        names = ", ".join(self.source_names)
        for number, phase in enumerate(self.config.phases):
            if len(phase.weights) != len(self.source_names):
                raise ConfigError(
                    f"data.phases[{number}].weights: {len(phase.weights)} weights for the {len(self.source_names)} "
                    f"sources of {self.config.path!r}; give one for each of {names}, in this order"
                )
            weights = round_weights([Fraction(repr(float(weight))) for weight in phase.weights])
            if phase.start == 0:
                stretches.clear()
            stretches.append(Stretch(phase.start, shares_of(weights)))
        return stretches

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
        for number, (name, store, windows) in enumerate(
            zip(self.source_names, self.dataset.stores, self.num_windows, strict=True)
        ):
            if windows > 0 or not any(stretch.shares[number] for stretch in self._stretches):
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


def _grouped(index_lists: Iterable[Sequence[int]], samples: int) -> Iterator[list[Sequence[int]]]:
    """Groups of lists with that many indices together; lists before an error come before the error."""
    group: list[Sequence[int]] = []
    size = 0
    try:
        for indices in index_lists:
            if len(indices) and min(indices) < 0:
                raise IndexError(f"sample {min(indices)}: indices start at 0")
            group.append(indices)
            size += len(indices)
            if size >= samples:
                yield group
                group, size = [], 0
    except Exception:
        if group:
            yield group
        raise
    if group:
        yield group


@functools.lru_cache(maxsize=1 << 12)
def _order_key(seed: int, fingerprint: str, split: str, epoch: int) -> int:
    """The key of the order in which one pass over a source visits its windows."""
    return xxhash.xxh3_64_intdigest(f"{seed}:{fingerprint}:{split}:{epoch}".encode())


def _size(vocab_size: int | None) -> str:
    return "null" if vocab_size is None else str(vocab_size)
