"""What the groups of the data benchmark share: the options, the corpus and the store, made when first asked for."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blues
from blues.data.storage.store import Store
from blues.errors import BluesError, ConfigError, DataError
from tuning.benchmarks.bench import Bench, Call, installed
from tuning.benchmarks.data import corpus as corp
from tuning.benchmarks.data.kept import Facts, code_of, kept
from tuning.benchmarks.record import number

MB = 10**6
TOKEN_BYTES = 4
HERE = Path(__file__).parent
READ_BYTES = 1 << 24
DATA = "data"
"""In the work folder: everything that was made to be measured."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a person chooses.

    corpus: folders of Python source (empty: the packages installed beside Blues); corpus_mb: so much of it. store_gb:
    size of the dataset that is read. windows: how many a loader delivers in a run. workers: processes that prepare.
    documents: drawn for the search for copies. edited: share of a repository's files that an update reads again.
    """

    corpus: tuple[str, ...] = ()
    corpus_mb: float | None = None
    store_gb: float = 10.0
    chunk_tokens: int = 2_500_000
    windows: int = 100_000
    window_tokens: int = 2049
    batch: int = 32
    workers: int = 2
    documents: int = 4000
    edited: float = 0.01
    seed: int = 0
    peer_python: str = sys.executable

    def __post_init__(self) -> None:
        if self.store_gb <= 0 or (self.corpus_mb is not None and self.corpus_mb <= 0):
            raise ConfigError("--store-gb and --corpus-mb must be more than 0")
        if self.windows < self.batch or self.workers < 1:
            raise ConfigError(f"--windows must be at least {self.batch} (one batch), and --num-workers at least 1")


@dataclass
class Setting:
    """A benchmark of the data side that is running."""

    bench: Bench
    options: Options
    _written: dict[str, BluesError | None] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where data is written."""
        return self.bench.work / DATA

    @functools.cached_property
    def corpus(self) -> corp.Corpus:
        """The source text that is prepared."""
        options = self.options
        roots = [Path(root) for root in options.corpus] or corp.default_roots()
        most = None if options.corpus_mb is None else int(options.corpus_mb * MB)
        made = corp.collect(self.folder / "corpus", roots, max_bytes=most, seed=options.seed, say=self.bench.say)
        self.bench.say(f"corpus: {made.files:,} files of Python, {made.size}, no file twice, xxh3 {made.xxh3}")
        return made

    @functools.cached_property
    def store(self) -> str:
        """A dataset of random tokens."""
        path, size = self.folder / "store", int(self.options.store_gb * 1e9)
        wanted = {"size": size, "chunk_tokens": self.options.chunk_tokens, "seed": self.options.seed}

        def write(path: Path) -> Facts:
            self._make_room(int(1.1 * size))
            return self.bench.call(self.ours("ours", "write_store", {"output": str(path), **wanted}))

        made = kept(path, {**wanted, "code": self.code("ours")}, write, say=self.bench.say)
        self.bench.say(f"store: {made['tokens']:,} random tokens in {made['chunks']} chunks, {made['MB/s']:.0f} MB/s")
        return str(path)

    @functools.cached_property
    def prepared(self) -> str:
        """The corpus as a dataset."""
        path = self.folder / "corpus-prepared"
        words = ["prepare", "--input-dir", self.corpus.path, "--data-cache-dir", str(path)]
        call = self.ours("ours", "command", {"words": words, "dataset": str(path)})
        request = {"corpus": self.corpus.xxh3, "code": self.code("ours")}
        kept(path, request, lambda path: self.bench.call(call), say=self.bench.say)
        return str(path)

    @functools.cached_property
    def token_files(self) -> list[str]:
        """The chunk files of the store's train split, in order."""
        return [str(path) for path in sorted(Path(self.store, "chunks").glob("train-*.tokens"))]

    @property
    def store_bytes(self) -> int:
        """Bytes of the tokens of both splits."""
        return sum(path.stat().st_size for path in Path(self.store, "chunks").glob("*.tokens"))

    @property
    def store_size(self) -> str:
        """`10.0 GB`."""
        return f"{number(self.store_bytes / 1e9)} GB"

    def ours(
        self,
        module: str,
        function: str,
        arguments: Mapping[str, Any],
        *,
        packages: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> Call:
        """A call of a module of this package, in this Python, which finds Blues where this process found it."""
        path = os.pathsep.join([str(Path(blues.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {"PYTHONPATH": path, **(variables or {})}
        return Call(str(HERE / f"{module}.py"), function, arguments, packages=tuple(packages), environment=environment)

    def peer(self, function: str, arguments: Mapping[str, Any], packages: Sequence[str]) -> Call:
        """A call of `peers.py` in the peers' Python."""
        environment = {"HF_HOME": str(self.folder / "huggingface")}
        python = self.options.peer_python
        return Call(str(HERE / "peers.py"), function, arguments, python, tuple(packages), environment)

    def peer_store(self, name: str, write: Call) -> str:
        """The folder of a peer's copy of the store, written by `write` when first asked for.

        Raises:
            BluesError: it cannot be written; the same one without another attempt when asked again.
        """
        folder = self.folder / name
        if name not in self._written:
            try:
                self._write(folder, write)
                self._written[name] = None
            except BluesError as error:
                self._written[name] = error
        if (problem := self._written[name]) is not None:
            raise problem
        return str(folder)

    def _write(self, folder: Path, write: Call) -> None:
        request = {
            "store": Store.open(self.store).fingerprint,
            "block": write.arguments["length"],
            "versions": installed(write.python, write.packages),
            "code": code_of(Path(write.file)),
        }

        def make(folder: Path) -> Facts:
            self._make_room(int(1.1 * self.store_bytes))
            return self.bench.call(write)

        seconds = kept(folder, request, make, say=self.bench.say)["s"]
        self.bench.say(f"  {folder.name}: the same tokens, written in {seconds:.0f} s")

    def code(self, *modules: str) -> str:
        """Checksum of the code that makes datasets here: that of Blues, and of modules of this package."""
        library = Path(blues.__file__).parent
        own = (HERE / f"{module}.py" for module in modules)
        return code_of(library / "data", library / "cluster" / "prepare.py", *own)

    def _make_room(self, size: int) -> None:
        """Be sure that `size` bytes fit.

        Raises:
            DataError: they do not.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise DataError(
                f"{str(self.folder)!r} has {free / 1e9:.1f} GB free and {size / 1e9:.1f} are needed; choose another "
                "--work or a smaller --store-gb"
            )


def settle() -> None:
    """Have everything written that waits for it: what earlier work left is not to slow down what is measured next."""
    os.sync()


def warm(files: Sequence[str]) -> None:
    """Read files once, so that they lie in the page cache (as far as it is large enough)."""
    buffer = bytearray(READ_BYTES)
    for name in files:
        with open(name, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cool(files: Sequence[str]) -> None:
    """Drop files from the page cache: what is read next comes from the disk."""
    for name in files:
        descriptor = os.open(name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def files_below(folder: str) -> list[str]:
    """All files below a folder, sorted."""
    return [str(path) for path in sorted(Path(folder).rglob("*")) if path.is_file()]
