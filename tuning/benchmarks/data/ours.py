"""What is measured of Blues. Every function runs in a process of its own (see `tuning.benchmarks.worker`).

In: `meter`, the class that measures a `with` block, and paths. Out: figures by name.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from blues.cluster.prepare import prepare as prepare_plan
from blues.data.mixture.batches import Mixture
from blues.data.reading.sources import plan
from blues.data.storage.chunks import TOKEN_TYPE, ChunkWriter, file_checksum
from blues.data.storage.store import SPLITS, Store
from blues.data.storage.versions import Draft, write_version
from blues.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tuning.benchmarks.worker import Meter

MB, GB = 1e6, 1e9
HELD_OUT_TOKENS = 100_000
MEDIAN_DOCUMENT, DOCUMENT_SIGMA = 1500, 1.2
"""Lengths of made-up documents in tokens: log-normal, about as Python files are."""


def blues(words: Sequence[str]) -> None:
    """Run a command of Blues as a person types it; if it fails, its own sentence stays the last one in the log."""
    status = subprocess.run([sys.executable, "-m", "blues.cli", *words]).returncode
    if status:
        sys.exit(status)


def command(meter: type[Meter], words: list[str], dataset: str, version: int = 1) -> dict:
    """The whole command, with the start of Python, that leaves `dataset` at `version`."""
    with meter() as spent:
        blues(words)
    found = Store.open(dataset).version
    if found != version:
        raise ValueError(f"{dataset} has version {found} where the command should have left {version}")
    return {"s": spent.seconds, "cpu s": spent.whole_cpu_s}


def follow(
    meter: type[Meter], repository: str, commit: str, output: str, mode: Literal["prepare", "update"], makes: bool
) -> dict:
    """What `blues prepare` does to a repository, in a process that has imported what is needed: planning beside what
    else must be read, and Ray's start where it is needed. makes: whether it should come to a new version."""
    import_module("ray.data")
    with meter() as spent:
        done = prepare_plan(partial(plan, repository, commit=commit), output, Tokenizer.Config(), mode=mode)
    if done.made != makes:
        raise ValueError(f"{'nothing was' if makes else 'something was'} made at {output}")
    documents = sum(done.store.num_documents(split) for split in SPLITS)
    return {"s": spent.seconds, "cpu s": spent.whole_cpu_s, "documents": documents}


def prepare(meter: type[Meter], corpus: str, size: int, output: str, workers: int, options: list[str]) -> dict:
    """The whole command: the start of Python and of Ray, reading, tokenizing, writing, fsync. size: bytes of text."""
    folder = Path(output).parent
    if folder.exists():  # a dataset, or the beginning of one, would save work
        raise ValueError(f"{folder} is there already; only preparing from the beginning is measured")
    folder.mkdir(parents=True)
    words = ["prepare", "--input-dir", corpus, "--data-cache-dir", output, "--num-workers", str(workers), *options]
    with meter() as spent:
        blues(words)
    store = Store.open(output)
    read = sum(store.text_bytes(split) for split in SPLITS)
    tokens = sum(store.num_tokens(split) - store.num_documents(split) for split in SPLITS)
    shutil.rmtree(folder)
    if read != size:
        raise ValueError(f"{read} bytes of text were prepared where the corpus has {size}")
    rates = {"MB/s": size / MB / spent.seconds, "MB/s a core": each(size / MB, spent.whole_cpu_s)}
    return rates | {"s": spent.seconds, "cpu s": spent.whole_cpu_s, "bytes": size, "tokens": tokens}


def each(amount: float, cpu_s: float | None) -> float | None:
    """An amount by second of processor time, where that could be counted."""
    return None if cpu_s is None else amount / cpu_s


def write_store(meter: type[Meter], output: str, size: int, chunk_tokens: int, seed: int) -> dict:
    """A dataset of random tokens of about `size` bytes, in chunks of `chunk_tokens`, as the library writes them."""
    tokenizer, path = Tokenizer.Config(), Path(output)
    built = tokenizer.build()
    ordinary, end = min(built.eot_id, 199_998), built.eot_id
    records: dict[str, list] = {split: [] for split in SPLITS}
    with meter() as spent:
        for number in range(max(1, round(size / TOKEN_TYPE.itemsize / chunk_tokens))):
            records["train"].append(_write_chunk(path, "train", number, chunk_tokens, ordinary, end, seed))
        records["validation"].append(
            _write_chunk(path, "validation", 0, min(chunk_tokens, 100_000), ordinary, end, seed)
        )
        draft = Draft(tokenizer=tokenizer, operation={"kind": "benchmark", "seed": seed}, chunks=records)
        store = write_version(path, 1, draft)
    tokens = store.num_tokens("train")
    return {
        "MB/s": tokens * TOKEN_TYPE.itemsize / MB / spent.seconds,
        "tokens": tokens,
        "chunks": len(records["train"]),
    }


def _write_chunk(path: Path, split: str, number: int, tokens: int, ordinary: int, end: int, seed: int):
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    content = rng.integers(0, ordinary, size=tokens, dtype=np.uint32)
    lengths = 1 + rng.lognormal(np.log(MEDIAN_DOCUMENT), DOCUMENT_SIGMA, size=tokens).astype(np.int64)
    ends = np.cumsum(lengths)
    ends = np.append(ends[ends < tokens], tokens)
    content[ends - 1] = end
    writer, start = ChunkWriter(path, split, number), 0
    for position, stop in enumerate(ends.tolist()):
        document = content[start:stop]
        writer.add(
            document, id=f"{split}-{number}-{position}", source="random", text_bytes=4 * len(document), metadata={}
        )
        start = stop
    return writer.close()


def read_windows(meter: type[Meter], store: str, windows: int, length: int, batch: int, seed: int) -> dict:
    """Random windows of a store as int64 tensors, by its fast path."""
    rng = np.random.default_rng(seed)
    torch.zeros(1)

    def make() -> Callable[[], torch.Tensor]:
        opened = Store.open(store)
        last = opened.num_tokens("train") - length

        def read() -> torch.Tensor:
            starts = rng.integers(0, last, size=batch, endpoint=True)
            return torch.from_numpy(opened.read_windows("train", starts, length).astype(np.int64))

        return read

    return meter.loader(make, windows // batch, batch * length * TOKEN_TYPE.itemsize)


def read_mixture(meter: type[Meter], store: str, windows: int, length: int, batch: int, seed: int) -> dict:
    """What training reads: batches of the mixture, every window of the source once, in the order of a permutation."""
    torch.zeros(1)

    def make() -> Callable[[], Any]:
        mixture = Mixture.Config(path=store, sequence_length=length - 1, seed=seed).build()
        numbers = iter(range(0, windows + batch, batch))
        return lambda: mixture.batch(range(first := next(numbers), first + batch))

    return meter.loader(make, windows // batch, batch * length * TOKEN_TYPE.itemsize)


def read_memmap(meter: type[Meter], files: list[str], windows: int, length: int, batch: int, seed: int) -> dict:
    """The plain way of nanoGPT: slices of a memory map (here one for each chunk file), copied to int64."""
    rng = np.random.default_rng(seed)
    torch.zeros(1)

    def make() -> Callable[[], torch.Tensor]:
        maps = [np.memmap(file, dtype=TOKEN_TYPE, mode="r") for file in files]
        chances = np.array([max(0, len(tokens) - length + 1) for tokens in maps], dtype=np.float64)
        chances /= chances.sum()

        def read() -> torch.Tensor:
            chosen = [maps[number] for number in rng.choice(len(maps), size=batch, p=chances)]
            starts = [int(rng.integers(0, len(tokens) - length, endpoint=True)) for tokens in chosen]
            rows = zip(chosen, starts, strict=True)
            return torch.stack([torch.from_numpy(m[start : start + length].astype(np.int64)) for m, start in rows])

        return read

    return meter.loader(make, windows // batch, batch * length * TOKEN_TYPE.itemsize)


def check(meter: type[Meter], store: str, size: int) -> dict:
    """`Store.check`: sizes, checksums, structure of everything. size: bytes of tokens."""
    opened = Store.open(store)
    with meter() as spent:
        issues = opened.check()
    if issues:
        raise ValueError(f"a dataset that was just written has issues: {issues[0]}")
    return _rates(size, spent.seconds, spent.cpu_s) | {"growth MB": spent.growth_mb}


def verify_command(meter: type[Meter], store: str, size: int) -> dict:
    """The whole command with its statistics; no document is tokenized again, for random tokens are no text."""
    with meter() as spent:
        blues(["verify", store, "--sample", "0"])
    return _rates(size, spent.seconds, spent.cpu_s)


def hash_files(meter: type[Meter], files: list[str], size: int, algorithm: str) -> dict:
    """Nothing but reading the token files and hashing them: xxh3, or the sha256 that other projects use."""
    with meter() as spent:
        for file in files:
            if algorithm == "xxh3":
                file_checksum(Path(file))
            else:
                with open(file, "rb") as content:
                    hashlib.file_digest(content, algorithm)
    return _rates(size, spent.seconds, spent.cpu_s)


def _rates(size: int, seconds: float, cpu_s: float) -> dict:
    return {"GB/s a core": size / GB / cpu_s, "GB/s": size / GB / seconds, "s": seconds}
