"""A dataset that is not whole yet: the folder it grows in beside its final name, and how it gets that name.

In: a request (what is being made of what), then a folder with a written version. Out: the same folder again after an
interruption, but never for another request; in the end the dataset under its name, in one step.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from blues import config as cfg
from blues.data.storage.chunks import CHUNKS, ChunkRecord
from blues.data.storage.manifest import MANIFEST, encode_json, parse_json, partial_directory
from blues.errors import DataError

REQUEST = "request.json"
"""In a growing dataset: what is being made of what, so that only the same command goes on with it."""


def open_growing(partial: Path, request: Mapping[str, Any]) -> None:
    """Have the growing dataset of this request at `partial`; what grew there for another request is removed."""
    try:
        same = parse_json((partial / REQUEST).read_bytes()) == request
    except (OSError, ValueError):
        same = False
    if same:
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    cfg.write_atomic(partial / REQUEST, encode_json(dict(request)))


@contextlib.contextmanager
def written_at(partial: Path) -> Iterator[None]:
    """Inside the `with` block what the operating system refuses, such as more space, is a `DataError`."""
    try:
        yield
    except OSError as problem:
        what = problem.strerror or " ".join(str(problem).split())  # Arrow's have no strerror
        raise DataError(f"cannot write {str(partial)!r}: {what}; check its permissions and free space") from None


def take_name(partial: Path, output: Path, chunks: Iterable[ChunkRecord], scratch: Iterable[str]) -> None:
    """Make the dataset at `partial`, whose version is written, the one at `output`.

    What it does not need goes first: the folders `scratch`, the request, and whatever a process that was killed left
    half-written. A dataset that is replaced stays whole until the new one takes its place.
    """
    whole = {record.file for chunk in chunks for record in (chunk.data, chunk.index)}
    for path in (partial / CHUNKS).iterdir():
        if path.relative_to(partial).as_posix() not in whole:
            path.unlink(missing_ok=True)
    for path in (*(partial / folder for folder in scratch), *partial.rglob(".*.tmp")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (partial / REQUEST).unlink(missing_ok=True)
    output, replaced = output.resolve(), _replaced(output)
    shutil.rmtree(replaced, ignore_errors=True)
    if output.exists():
        output.rename(replaced)
    partial.rename(output)
    cfg.fsync_folder(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(output: Path) -> None:
    """Finish what a process that was killed in `take_name` left, or take it back: called by whoever has the lock."""
    partial, replaced = partial_directory(output), _replaced(output)
    if not output.exists():
        if (partial / MANIFEST).exists() and not (partial / REQUEST).exists():
            partial.rename(output.resolve())
        elif replaced.exists():
            replaced.rename(output.resolve())
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced(output: Path) -> Path:
    """Where a dataset lies while another takes its place."""
    place = output.resolve()
    return place.with_name(f".{place.name}.replaced")
