"""What the person named, as a place and the files there.

In: a path, a URL or a git repository. Out: `Located`, with the listing of the files that are to be read.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

from blues.data.reading import git
from blues.data.reading.git_changes import Known, entries_since
from blues.data.reading.places import Choose, Listing, LocalFiles, Place
from blues.data.reading.places import shown as as_text
from blues.data.reading.remote import RemoteFiles, redact
from blues.data.storage.manifest import is_dataset
from blues.errors import DataError

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
Report = Callable[[str], None]
AskKnown = Callable[[], Known | None]


@dataclass(frozen=True)
class Located:
    """Where a source lies. name: what it is called. shown: what the person named, in quotes, without passwords.
    single: a file was named, so that what is wrong with it is an error."""

    place: Place
    name: str
    shown: str
    listing: Listing
    single: bool = False


def locate(
    path: str | Path,
    commit: str | None,
    choose: Choose,
    ignored: Counter[str],
    report: Report,
    known: AskKnown = lambda: None,
) -> Located:
    """Find out what a path or URL is and list the files there that `choose` lets through.

    known: asked for what there is to know of a repository, so that only what changed since must be listed.

    Raises:
        DataError: nothing is there, it is a dataset of Blues, or it cannot be listed.
    """
    text = os.fspath(path)
    if not text:
        raise DataError("no file, folder or URL was named: the path is empty; check --dataset or --input-dir")
    if text.startswith("git+"):
        return _repository(git.of_url(text, commit, report), text, choose, ignored, known)
    if URL.match(text) and not text.startswith("file://") and not os.path.exists(text):
        if commit is not None:
            raise DataError(f"{redact(text)!r} has no commits (--commit); for a git repository write git+https://...")
        return _remote(text, choose, ignored)
    local = _local_path(text)
    if commit is not None and os.path.isfile(local):
        return _file_of_repository(local, commit, ignored)
    if commit is not None or git.is_bare(local):
        return _repository(git.of_folder(local, commit), str(local), choose, ignored, known)
    return _local(local, choose, ignored)


def _local_path(text: str) -> Path:
    if not text.startswith("file://"):
        return Path(text)
    path = text.removeprefix("file://").removeprefix("localhost")
    return Path(path if os.path.exists(path) else unquote(path))


def _local(path: Path, choose: Choose, ignored: Counter[str]) -> Located:
    shown = repr(str(path))
    try:
        mode = path.stat().st_mode
        name = as_text(path.resolve().name)
    except FileNotFoundError:
        raise DataError(f"there is no file or folder {shown}; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise DataError(f"cannot read {shown}: {getattr(error, 'strerror', None) or error}") from None
    if is_dataset(path):
        raise DataError(f"{shown} is a dataset of Blues already; name the files it was to be made of")
    if stat.S_ISDIR(mode):
        place = LocalFiles(path)
        return Located(place, name, shown, place.entries(choose, ignored))
    if not stat.S_ISREG(mode):
        raise DataError(f"{shown} is neither a file nor a folder, and a pipe or device cannot be read twice")
    place = LocalFiles(path.parent)
    return Located(place, name, shown, Listing.of([place.entry(path.name)]), single=True)


def _remote(url: str, choose: Choose, ignored: Counter[str]) -> Located:
    place = RemoteFiles(url)
    single = place.is_file(choose)
    listing = Listing.of([place.entry()]) if single else place.entries(choose, ignored)
    return Located(place, place.name, repr(redact(url)), listing, single)


def _repository(place: git.GitFiles, shown: str, choose: Choose, ignored: Counter[str], known: AskKnown) -> Located:
    listing = entries_since(place, known(), choose, ignored)
    if listing is None:
        listing = place.entries(choose, ignored)
    return Located(place, place.name, f"{redact(shown)!r} at {place.commit[:12]}", listing)


def _file_of_repository(path: Path, commit: str, ignored: Counter[str]) -> Located:
    place = replace(git.of_folder(path.parent, commit), tree="")  # of which one file is no listing
    shown = f"{str(path)!r} at {place.commit[:12]}"
    name = as_text(path.name)
    listing = place.entries(lambda _: None, ignored)
    if name not in listing.names:
        raise DataError(f"there is no file {shown}; it is newer than that commit")
    ignored.clear()
    return Located(place, name, shown, Listing.of([listing.entry(listing.names.index(name))]), single=True)
