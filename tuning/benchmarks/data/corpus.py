"""The text that everybody gets: Python source of this machine, copied once so that it stays the same.

In: folders. Out: a folder of .py files and what is known of it. Only UTF-8 text, no empty file, and no file twice: a
tokenizer that remembers what it has seen must not profit from copies of a module.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash

from blues.config import write_atomic
from blues.errors import DataError


@dataclass(frozen=True)
class Corpus:
    """A folder of source files: how many, their bytes, and a checksum of names and contents."""

    path: str
    files: int
    bytes: int
    xxh3: str


def default_roots() -> list[Path]:
    """The packages installed beside Blues, and the interpreter's standard library."""
    paths = sysconfig.get_paths()
    return [Path(paths["purelib"]), Path(paths["stdlib"])]


def collect(target: Path, roots: Sequence[Path], *, max_bytes: int | None = None, seed: int = 0) -> Corpus:
    """Copy the Python files below `roots` to `target`; an earlier copy is used again.

    Args:
        max_bytes: about how much is taken, drawn at random with `seed`; None for all.

    Raises:
        DataError: there is no Python file.
    """
    done = target.with_suffix(".json")
    asked = {"roots": [str(root) for root in roots], "max_bytes": max_bytes, "seed": seed}
    if done.exists():
        known = json.loads(done.read_bytes())
        if known["asked"] == asked:
            return Corpus(**known["corpus"])
    sources = [(number, root, file) for number, root in enumerate(roots) for file in _python_files(root)]
    if max_bytes is not None:
        np.random.default_rng(seed).shuffle(sources)
    shutil.rmtree(target, ignore_errors=True)
    seen: dict[str, str] = {}
    size = 0
    for number, root, file in sources:
        content = (root / file).read_bytes()
        digest = xxhash.xxh3_128_hexdigest(content)
        if not content or digest in seen or not _is_text(content):
            continue
        if max_bytes is not None and size + len(content) > max_bytes:
            break
        name = f"{number}/{file}"
        seen[digest] = name
        size += len(content)
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content)
    if not seen:
        raise DataError(f"there is no Python file below {', '.join(map(str, roots))}; name another --corpus")
    names = sorted((name, digest) for digest, name in seen.items())
    corpus = Corpus(str(target), len(seen), size, xxhash.xxh3_128_hexdigest(repr(names).encode()))
    write_atomic(done, json.dumps({"asked": asked, "corpus": asdict(corpus)}).encode())
    return corpus


def share_of(corpus: Corpus, target: Path, every: int) -> Corpus:
    """A folder with every n-th file of a corpus, as hard links."""
    names = files_of(corpus)[::every]
    size = 0
    for name in names:
        link = target / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            os.link(Path(corpus.path, name), link)
        size += link.stat().st_size
    return Corpus(str(target), len(names), size, f"{corpus.xxh3}/{every}")


def files_of(corpus: Corpus) -> list[str]:
    """The files of a corpus relative to it, sorted."""
    return sorted(_python_files(Path(corpus.path)))


def _python_files(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in ("__pycache__", "node_modules")
            and not (name == "site-packages" and folder == str(root))  # below the standard library: others' packages
        )
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(".py") and not name.startswith(".") and path.is_file() and not path.is_symlink():
                yield path.relative_to(root).as_posix()


def _is_text(content: bytes) -> bool:
    """UTF-8 for every reader: no byte order mark, and no other encoding declared (PEP 263)."""
    try:
        content.decode("utf-8")
        return tokenize.detect_encoding(io.BytesIO(content).readline)[0] == "utf-8"
    except (UnicodeDecodeError, SyntaxError):
        return False
