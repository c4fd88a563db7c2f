"""What a dataset already is when it is prepared again: which files were read, how, and what an update can build upon.

In: a dataset directory, a plan of source files, settings. Out: a `Base` to go on from, or a sentence why there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa

from blues import __version__
from blues import config as cfg
from blues.data.reading.git_changes import Known
from blues.data.reading.sources import Plan
from blues.data.storage import versions
from blues.data.storage.arrays import flags, positions, whole_numbers
from blues.data.storage.chunks import SUFFIXES, Compression, numbers
from blues.data.storage.manifest import MANIFEST, MIXTURE, read_regular
from blues.data.storage.store import SPLITS, Store
from blues.data.tokenizer import Tokenizer
from blues.errors import DataError

Read = TypeVar("Read")
Mode = Literal["prepare", "update", "append"]
RAW = ("prepare", "update", "append")
"""Operations whose versions hold every document of their sources, so that an update can build upon them."""


@dataclass(frozen=True)
class Settings:
    """What decides the content of a dataset beside its sources."""

    tokenizer: Tokenizer.Config
    validation_fraction: float = 0.05
    compression: Compression = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise DataError(f"validation fraction {self.validation_fraction} is not a share; give a number in [0, 1)")
        if self.compression not in SUFFIXES:
            raise DataError(f"unknown compression {self.compression!r}.{cfg.nearest(self.compression, SUFFIXES)}")

    def tree(self) -> dict[str, Any]:
        """As the manifest keeps them; the tokenizer has a place of its own there."""
        return {"validation_fraction": self.validation_fraction, "compression": self.compression}


class Ahead:
    """What an update needs of the dataset at `output`, read in a thread while its source is looked through.

    Whoever writes there may do so meanwhile: `is_current` says whether it still is what lies there. Whatever goes wrong
    is raised where a result is asked for, and so as if it had been read there and then.
    """

    def __init__(self, output: Path, tokenizer: Tokenizer.Config) -> None:
        self._output, self._pool = output, ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._manifest = self._pool.submit(read_regular, output / MANIFEST)
        self.stores = self._pool.submit(_newest_and_raw, output)
        self.files = self._pool.submit(self._of_raw, versions.files_of)
        self._encoding = self._pool.submit(tokenizer.build)
        self.documents = {
            split: self._pool.submit(self._of_raw, partial(versions.documents_of, split=split)) for split in SPLITS
        }

    def _of_raw(self, function: Callable[[Store], Read]) -> Read:
        return function(self.stores.result()[1])

    def known(self) -> Known | None:
        """What the dataset says of the commit it was made of; None where it is of something else, or of more."""
        if self.stores.exception() is not None:
            return None  # `find_base` says so, once there is a plan
        manifest = self.stores.result()[1].manifest
        sources = manifest["sources"]
        same_rules = manifest["code"].get("blues") == __version__  # of what is read and what is passed over
        if len(sources) != 1 or not sources[0].get("tree") or not same_rules or self.files.exception() is not None:
            return None
        return Known(sources[0]["tree"], sources[0]["ignored"], self.files.result)

    def is_current(self) -> bool:
        """Whether the newest version is still the one that was read."""
        return self._manifest.exception() is None and self._manifest.result() == read_regular(self._output / MANIFEST)

    def wait_for_tokenizer(self) -> None:
        """Until the vocabulary is there, so that it is not loaded twice."""
        wait([self._encoding])

    def close(self) -> None:
        """Leave what was not begun."""
        self._pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Base:
    """What an update or an addition goes on from.

    newest: the version that is replaced. raw: the newest that holds all documents of its sources (removing duplicates
    makes one that does not). origin: which of its sources is prepared again; one past the last for an addition.
    """

    newest: Store
    raw: Store
    origin: int
    ahead: Ahead | None = None

    @cached_property
    def files(self) -> pa.Table:
        """All files of `raw`, in their order: versions.FILES_SCHEMA."""
        return versions.files_of(self.raw) if self.ahead is None else self.ahead.files.result()

    def documents(self, split: str) -> tuple[np.ndarray, pa.Array]:
        """`versions.documents_of` a split of `raw`."""
        return versions.documents_of(self.raw, split) if self.ahead is None else self.ahead.documents[split].result()

    @cached_property
    def own_files(self) -> pa.Table:
        """The files of the source that is prepared again."""
        return self._of(self.is_own)

    @cached_property
    def others(self) -> pa.Table:
        """The files of the other sources."""
        return self._of(~self.is_own)

    @cached_property
    def is_own(self) -> np.ndarray:
        """Which of `files` are of the source that is prepared again: bool[files]."""
        return numbers(self.files, "origin") == self.origin

    def _of(self, chosen: np.ndarray) -> pa.Table:
        return self.files if chosen.all() else self.files.filter(flags(chosen))

    def holds(self, files: pa.Table) -> bool:
        """Whether the source is what it was: the same files with the same content, read in the same way."""
        return self.own_files.equals(files)


def files_table(plan: Plan, origin: int = 0) -> pa.Table:
    """The plan's files as `versions.FILES_SCHEMA`: what was read, how, a checksum of it, and which source it is of."""
    origins = whole_numbers(np.full(len(plan.files), origin), pa.uint32())
    return plan.files.append_column("origin", origins)


def find_base(output: Path, plan: Plan, settings: Settings, mode: Mode, ahead: Ahead | None = None) -> Base:
    """What `mode` goes on from: the dataset at `output`. `ahead`: what was read of it already.

    Raises:
        DataError: it was made with other settings, or `mode` does not fit its sources.
    """
    if ahead is not None and not ahead.is_current():
        ahead = None
    newest, raw = _newest_and_raw(output) if ahead is None else ahead.stores.result()
    manifest = raw.manifest
    present = {key: manifest["settings"].get(key) for key in settings.tree()} | {"tokenizer": raw.tokenizer}
    asked = settings.tree() | {"tokenizer": settings.tokenizer}
    differing = ", ".join(key for key in asked if present[key] != asked[key])
    if differing:
        raise DataError(
            f"{str(output)!r} already holds another dataset, prepared with another {differing}; name the same, choose "
            "a different --data-cache-dir, or --overwrite to replace it"
        )
    names = [source["name"] for source in manifest["sources"]]
    if mode == "append":
        base = Base(newest, raw, len(names), ahead)
        _refuse_names_of_others(base, plan)
        return base
    if len(names) > 1 and names.count(plan.name) != 1:
        raise DataError(
            f"{str(output)!r} is made of several sources and none of them is {plan.name!r}: {', '.join(names)}; "
            "name one of those to update it, or --append to add another"
        )
    base = Base(newest, raw, names.index(plan.name) if len(names) > 1 else 0, ahead)
    _refuse_names_of_others(base, plan)
    return base


def _refuse_names_of_others(base: Base, plan: Plan) -> None:
    """Raise if a file of the plan has the name of one of another source: a document names its file, not its source."""
    again_F = positions(plan.files["file"], base.others["file"]) >= 0
    if again_F.any():
        again = plan.listing.names[int(again_F.argmax())]
        raise DataError(
            f"{str(base.newest.path)!r} holds a file {again!r} of another source already; rename it, or use --update "
            "with that source to read its changed files anew"
        )


def holds_dataset(output: Path) -> bool:
    """Whether a prepared dataset is at `output`; False where nothing is.

    Raises:
        DataError: something else is.
    """
    if output.is_file():
        raise DataError(f"{str(output)!r} is a file; choose a directory for the dataset")
    if not output.exists() or not any(output.iterdir()):
        return False
    if not (output / MANIFEST).exists():
        kind = "a merged dataset" if (output / MIXTURE).exists() else "something else"
        raise DataError(f"{str(output)!r} already holds {kind}; choose another --data-cache-dir")
    return True


def _newest_and_raw(output: Path) -> tuple[Store, Store]:
    """The newest version, and the newest that holds every document of its sources."""
    newest = store = Store.open(output)
    while store.manifest["operation"]["kind"] not in RAW:
        if store.manifest["parent"] is None:
            kind = store.manifest["operation"]["kind"]
            raise DataError(f"{str(newest.path)!r} was made by {kind!r}, not prepared; prepare its sources instead")
        store = Store.open(newest.path, checksum=store.manifest["parent"])
    return newest, store
