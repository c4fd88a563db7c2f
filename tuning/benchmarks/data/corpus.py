"""The text that everybody gets: Python source of this machine, copied once so that it stays the same.

In: folders. Out: a folder of .py files and what is known of it. No file twice: a tokenizer that remembers what it has
seen must not profit from copies of a module. Only files of which every contestant takes every byte: UTF-8 text without
a mark, and nothing that Blues rejects (blank files, NUL bytes, files larger than its limit, pointers of git LFS).
"""

from __future__ import annotations

import io
import os
import shutil
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from blues.data.reading.places import passes_over
from blues.data.reading.readers import is_lfs_pointer
from blues.data.reading.streams import MAX_DOCUMENT_BYTES
from blues.errors import DataError
from tuning.benchmarks.data.kept import Facts, code_of, kept
from tuning.benchmarks.record import number

MB = 1e6


@dataclass(frozen=True)
class Corpus:
    """A folder of source files: how many, their bytes, and a checksum of names and contents."""

    path: str
    files: int
    bytes: int
    xxh3: str

    @property
    def size(self) -> str:
        """`1,145 MB`."""
        return f"{number(self.bytes / MB)} MB"


def default_roots() -> list[Path]:
    """The packages installed beside Blues, and the interpreter's standard library."""
    paths = sysconfig.get_paths()
    return [Path(paths["purelib"]), Path(paths["stdlib"])]


def collect(
    target: Path,
    roots: Sequence[Path],
    *,
    max_bytes: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Corpus:
    """Copy the Python files below `roots` to `target`.

    An earlier copy that was asked for in the same words is used again if nothing has happened to it; the folders it
    was made of may have changed since.

    Args:
        max_bytes: about how much is taken, drawn at random with `seed`; None for all.
        say: is told whether an earlier copy is used.

    Raises:
        DataError: there is no Python file.
    """
    request = {
        "folders": [str(root.absolute()) for root in roots],
        "max_bytes": max_bytes,
        "seed": seed,
        "code": code_of(Path(__file__)),
    }
    make = partial(_copy, roots=roots, max_bytes=max_bytes, seed=seed)
    return Corpus(str(target), **kept(target, request, make, intact=partial(_intact, target), say=say))


def _copy(target: Path, roots: Sequence[Path], max_bytes: int | None, seed: int) -> Facts:
    made = target.parent.absolute()  # the work folder may lie below a root
    sources = [(place, root, file) for place, root in enumerate(roots) for file in _python_files(root, made)]
    if max_bytes is not None:
        np.random.default_rng(seed).shuffle(sources)
    digests: dict[str, str] = {}
    size = 0
    for place, root, file in sources:
        content = (root / file).read_bytes()
        digest = xxhash.xxh3_128_hexdigest(content)
        if digest in digests or not _is_text(content):
            continue
        if max_bytes is not None and size + len(content) > max_bytes:
            break
        name = f"{place}/{file}"
        digests[digest] = name
        size += len(content)
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content)
    if not digests:
        raise DataError(f"there is no Python file below {', '.join(map(str, roots))}; name another --corpus")
    return {"files": len(digests), "bytes": size, "xxh3": _checksum((name, digest) for digest, name in digests.items())}


def _intact(target: Path, facts: Facts) -> bool:
    contents = ((name, xxhash.xxh3_128_hexdigest((target / name).read_bytes())) for name in _python_files(target))
    return _checksum(contents) == facts["xxh3"]


def _checksum(contents: Iterator[tuple[str, str]]) -> str:
    """Of names with the checksums of their contents, in any order."""
    return xxhash.xxh3_128_hexdigest(repr(sorted(contents)).encode())


def share_of(corpus: Corpus, target: Path, every: int) -> Corpus:
    """A folder with every n-th file of a corpus, as hard links; what was there is removed."""
    names = files_of(corpus)[::every]
    size = 0
    shutil.rmtree(target, ignore_errors=True)
    for name in names:
        link = target / name
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(Path(corpus.path, name), link)
        size += link.stat().st_size
    return Corpus(str(target), len(names), size, f"{corpus.xxh3}/{every}")


def files_of(corpus: Corpus) -> list[str]:
    """The files of a corpus relative to it, sorted."""
    return sorted(_python_files(Path(corpus.path)))


def _python_files(root: Path, without: Path | None = None) -> Iterator[str]:
    """Files ending in .py, relative to the root; not those below the folder `without`."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if not passes_over(name)
            and not (name == "site-packages" and folder == str(root))  # below the standard library: others' packages
            and (without is None or Path(folder, name).absolute() != without)
        )
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(".py") and not name.startswith(".") and path.is_file() and not path.is_symlink():
                yield path.relative_to(root).as_posix()


def _is_text(content: bytes) -> bool:
    """UTF-8 for every reader (no byte order mark, no other encoding declared: PEP 263), and a document for Blues."""
    if not 0 < len(content) <= MAX_DOCUMENT_BYTES or b"\0" in content or is_lfs_pointer(content):
        return False
    try:
        text = content.decode("utf-8")
        return not text.isspace() and tokenize.detect_encoding(io.BytesIO(content).readline)[0] == "utf-8"
    except (UnicodeDecodeError, SyntaxError):
        return False
