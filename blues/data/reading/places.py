"""Places where source files lie, and one way to list and open them: a folder, a URL, a commit of a git repository.

In: what the person named. Out: a `Place` that gives a `Listing` of its files and opens them in any process, wherever it
was pickled to.
`LocalFiles` is here, `RemoteFiles` in `remote.py`, `GitFiles` in `git.py`.

A place says what a file contains without others reading it: equal content tokens mean equal bytes.

Of a great many files few are new at any time: a listing holds columns, and an `Entry` is made where one is asked for.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from itertools import islice, pairwise
from operator import lt
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import xxhash

from blues.data.storage.manifest import MANIFEST, MIXTURE, is_dataset
from blues.errors import DataError

READ_BYTES = 1 << 20
SKIPPED_FOLDERS = frozenset(("__pycache__", "node_modules"))
LINK = "link or special file"
"""Why a symbolic link, a FIFO, a socket or a device is passed over: following links could go round in circles."""
HIDDEN, SUBMODULES, EMPTY_TABLE = "hidden file", "submodule", "empty table"
"""Further reasons that do not go by a suffix."""

Choose = Callable[[str], str | None]
"""Why a file of this name is passed over; None if it is read."""

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Entry:
    """A file at a place.

    file: its name below the place, with `/`, always valid Unicode: what documents, manifests and messages carry.
    path: how the place finds it (a name that is not UTF-8 differs from `file`).
    size: bytes as they lie there. stamp: another one means that the content may be another. seeks: a piece of it can be
    read without what lies before.
    """

    file: str
    path: str = field(repr=False)  # of a URL it may hold a signature
    size: int
    stamp: str
    seeks: bool = True


@dataclass(frozen=True)
class Listing:
    """Files at a place, one column for each field of `Entry`; `seeks` is None where all of them do."""

    names: Sequence[str] = ()
    paths: Sequence[str] = field(default=(), repr=False)
    sizes: Sequence[int] = ()
    stamps: Sequence[str | int] = ()
    seeks: Sequence[bool] | None = None

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Listing:
        """The same files in columns."""
        columns = [*zip(*((e.file, e.path, e.size, e.stamp, e.seeks) for e in entries), strict=True)]
        return cls(*columns)

    def __len__(self) -> int:
        return len(self.names)

    def entry(self, number: int) -> Entry:
        """One of the files."""
        seeks = self.seeks is None or self.seeks[number]
        return Entry(self.names[number], self.paths[number], self.sizes[number], str(self.stamps[number]), seeks)

    def entries(self) -> list[Entry]:
        """All of them."""
        return [self.entry(number) for number in range(len(self))]


class Place(ABC):
    """Where source files lie. It is pickled to the processes that read."""

    @property
    def threads(self) -> int:
        """How many files are worth looking at at a time while planning."""
        return 1

    @abstractmethod
    def entries(self, choose: Choose, ignored: Counter[str]) -> Listing:
        """Every file that `choose` lets through, in the order of names; the others are counted by reason. A place that
        does not learn sizes and stamps by listing leaves them to `look`.

        Links, hidden folders and SKIPPED_FOLDERS are not entered.

        Raises:
            DataError: a folder that cannot be listed.
        """

    @abstractmethod
    def open(self, entry: Entry) -> BinaryIO:
        """A buffered stream of its bytes. It can seek if the entry says so. Reading raises OSError."""

    @abstractmethod
    def check(self, entry: Entry) -> None:
        """Raises DataError if the file is another one than `entry` describes, and OSError if it cannot be reached."""

    @abstractmethod
    def where(self, file: str) -> str:
        """The file in quotes, for messages; `""` is the place itself."""

    def resolve(self, entry: Entry) -> Entry:
        """The entry with size and stamp, where listing the place did not tell them."""
        return entry

    def content(self, entry: Entry) -> str:
        """What the file contains, as a token: `xxh3:` of its bytes unless the place knows without reading."""
        digest = xxhash.xxh3_128()
        with self.open(entry) as stream:
            while block := stream.read(READ_BYTES):
                digest.update(block)
        return f"xxh3:{digest.hexdigest()}"

    def look(self, listing: Listing) -> tuple[Listing, Sequence[str]]:
        """Every file's `resolve` and `content`. A place that can do better than one by one does so.

        Raises:
            DataError: a file that cannot be read.
        """

        def one(entry: Entry) -> tuple[Entry, str]:
            try:
                entry = self.resolve(entry)
                return entry, self.content(entry)
            except OSError as error:
                raise self.unreadable(entry.file, error) from None

        seen = in_threads(self.threads, one, listing.entries())
        return Listing.of(entry for entry, _ in seen), [content for _, content in seen]

    def unreadable(self, file: str, error: OSError) -> DataError:
        """The sentence for what the system said of a file."""
        return DataError(f"cannot read {self.where(file)}: {error.strerror or error}")

    def cut_above(self, total: int) -> int:
        """Files up to this size are read as one part, of a source of `total` bytes."""
        return 0

    def absolute(self) -> Place:
        """The same place for a process that works in another folder."""
        return self

    def provenance(self) -> dict[str, Any]:
        """What a manifest says about the place beyond its name: its `kind`, never a path of this machine."""
        return {"kind": "files"}


@dataclass(frozen=True)
class LocalFiles(Place):
    """The files below a folder of this machine, or of a disk that all machines see."""

    folder: Path

    def entries(self, choose: Choose, ignored: Counter[str]) -> Listing:
        found: list[str] = []
        folders = [""]
        while folders:
            below = folders.pop()
            prefix = f"{below}/" if below else ""
            path = os.path.join(self.folder, below) if below else str(self.folder)
            items = _list(path)
            if any(item.name in (MANIFEST, MIXTURE) for item in items) and is_dataset(Path(path)):
                continue  # not counted: the plan must be the same once the output is there
            for item in items:
                name = item.name
                if item.is_dir(follow_symlinks=False):
                    if not passes_over(name):
                        folders.append(prefix + name)
                    continue
                reason = choose(name) if item.is_file(follow_symlinks=False) else LINK
                if reason is None:
                    found.append(prefix + name)
                else:
                    ignored[reason] += 1
        found.sort()
        return in_order(Listing(texts(found), found))

    def entry(self, path: str) -> Entry:
        """The entry of a file below the folder.

        Raises:
            DataError: it is not there any more.
        """
        try:
            status = os.stat(os.path.join(self.folder, path))
        except OSError as error:
            raise self.unreadable(shown(path), error) from None
        return Entry(shown(path), path, status.st_size, str(status.st_mtime_ns))

    def look(self, listing: Listing) -> tuple[Listing, list[str]]:
        """Sizes, times and contents, with each file opened once and, if it is small, read at once."""
        folder = os.path.join(self.folder, "")
        sizes: list[int] = []
        stamps: list[int] = []
        contents: list[str] = []
        for number, path in enumerate(listing.paths):
            try:
                file = os.open(folder + path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not hang
                try:
                    status = os.fstat(file)
                    content = os.read(file, min(status.st_size + 1, READ_BYTES))
                    whole = len(content) == status.st_size
                    digest = xxhash.xxh3_128_hexdigest(content) if whole else _digest(file, content)
                finally:
                    os.close(file)
            except OSError as error:
                raise self.unreadable(listing.names[number], error) from None
            sizes.append(status.st_size)
            stamps.append(status.st_mtime_ns)
            contents.append(f"xxh3:{digest}")
        return replace(listing, sizes=sizes, stamps=stamps), contents

    def open(self, entry: Entry) -> BinaryIO:
        buffering = min(max(entry.size + 1, 4096), READ_BYTES)  # a large buffer costs more than a small file
        return open(os.path.join(self.folder, entry.path), "rb", buffering=buffering)

    def check(self, entry: Entry) -> None:
        status = os.stat(os.path.join(self.folder, entry.path))
        if not stat.S_ISREG(status.st_mode) or (status.st_size, str(status.st_mtime_ns)) != (entry.size, entry.stamp):
            raise DataError(f"{self.where(entry.file)} changed while it was being prepared; run the command again")

    def where(self, file: str) -> str:
        return repr(str(self.folder / file if file else self.folder))

    def absolute(self) -> LocalFiles:
        return LocalFiles(self.folder.absolute())


def _list(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as listing:
            return list(listing)
    except OSError as error:
        raise DataError(f"cannot read folder {folder!r}: {error.strerror}; mend its permissions") from None


def passes_over(folder: str) -> bool:
    """Whether a folder of this name is not entered: hidden ones, and those that hold what tools made."""
    return folder.startswith(".") or folder in SKIPPED_FOLDERS


def hidden_below(path: str) -> bool:
    """Whether a file lies in a folder that is not entered."""
    return any(passes_over(folder) for folder in path.split("/")[:-1])


def shown(path: str) -> str:
    """A name as valid Unicode: bytes of it that are not UTF-8 appear as `\\xNN`."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def texts(paths: list[str]) -> list[str]:
    """`shown` of every name."""
    try:
        "".join(paths).encode()
    except UnicodeEncodeError:
        return [shown(path) for path in paths]
    return paths


def in_order(listing: Listing) -> Listing:
    """The files sorted by name.

    Raises:
        DataError: two names read alike, which only names that are not UTF-8 can.
    """
    names = listing.names
    if all(map(lt, names, islice(names, 1, None))):
        return listing
    order = sorted(range(len(names)), key=names.__getitem__)
    for first, second in pairwise(order):
        if names[first] == names[second]:
            raise DataError(f"two files would both be called {names[first]!r} once their names are text; rename one")
    columns = (getattr(listing, column.name) for column in fields(listing))
    return Listing(*(column and [column[number] for number in order] for column in columns))


def in_threads(threads: int, function: Callable[[Given], Made], items: Sequence[Given]) -> list[Made]:
    """The results in order, several at a time where each takes long to reach."""
    if threads == 1 or len(items) < 2:
        return list(map(function, items))
    with ThreadPoolExecutor(threads) as pool:
        try:
            return list(pool.map(function, items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # one failure, or Ctrl-C, is enough
            raise


def _digest(file: int, content: bytes) -> str:
    """The checksum of an open file that is read on, `content` being its beginning."""
    digest = xxhash.xxh3_128()
    while content:
        digest.update(content)
        content = os.read(file, READ_BYTES)
    return digest.hexdigest()
