"""Places where source files lie, and one way to list and open them: a folder, a URL, a commit of a git repository.

In: what the person named. Out: a `Place` that lists `Entry`s and opens them in any process, wherever it was pickled to.
`LocalFiles` is here, `RemoteFiles` in `remote.py`, `GitFiles` in `git.py`.

A place says what a file contains without others reading it: equal content tokens mean equal bytes.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from blues.data.storage.manifest import is_dataset
from blues.errors import DataError

READ_BYTES = 1 << 20
SKIPPED_FOLDERS = frozenset(("__pycache__", "node_modules"))
LINK = "link or special file"
"""Why a symbolic link, a FIFO, a socket or a device is passed over: following links could go round in circles."""

Choose = Callable[[str], str | None]
"""Why a file of this name is passed over; None if it is read."""


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


class Place(ABC):
    """Where source files lie. It is pickled to the processes that read."""

    @property
    def threads(self) -> int:
        """How many files are worth looking at at a time while planning."""
        return 1

    @abstractmethod
    def entries(self, choose: Choose, ignored: Counter[str]) -> list[Entry]:
        """Every file that `choose` lets through, in the order of `file`; the others are counted by reason.

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

    def entries(self, choose: Choose, ignored: Counter[str]) -> list[Entry]:
        found: list[Entry] = []
        folders = [""]
        while folders:
            below = folders.pop()
            path = os.path.join(self.folder, below) if below else str(self.folder)
            if is_dataset(Path(path)):  # not counted: the plan must be the same once the output is there
                continue
            for item in _list(path):
                if item.is_dir(follow_symlinks=False):
                    if not passes_over(item.name):
                        folders.append(f"{below}/{item.name}" if below else item.name)
                    continue
                regular = item.is_file(follow_symlinks=False)
                reason = choose(item.name) if regular else LINK
                if reason is not None:
                    ignored[reason] += 1
                    continue
                found.append(self.entry(f"{below}/{item.name}" if below else item.name))
        return in_order(found)

    def entry(self, path: str) -> Entry:
        """The entry of a file below the folder.

        Raises:
            DataError: it is not there any more.
        """
        try:
            status = os.stat(os.path.join(self.folder, path))
        except OSError as error:
            raise DataError(f"cannot read {self.where(shown(path))}: {error.strerror}") from None
        return Entry(shown(path), path, status.st_size, str(status.st_mtime_ns))

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


def _list(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as listing:
            yield from listing
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


def in_order(entries: list[Entry]) -> list[Entry]:
    """Sorted by name.

    Raises:
        DataError: two names read alike, which only names that are not UTF-8 can.
    """
    entries.sort(key=lambda entry: entry.file)
    for first, second in zip(entries, entries[1:], strict=False):
        if first.file == second.file:
            raise DataError(f"two files would both be called {first.file!r} once their names are text; rename one")
    return entries
