"""A git repository with a history: a corpus as commit A, and commit B with some files edited, removed and renamed.

In: a corpus, shares, a seed. Out: the repository and its two commits, the same for the same input. Objects lie as in a
clone that somebody works in: those of A in a pack, as they are fetched, those of B loose, as `git commit` leaves them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from blues.errors import DataError
from tuning.benchmarks.data.corpus import Corpus, files_of
from tuning.benchmarks.data.kept import Facts, code_of, kept

WHO_AND_WHEN = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "Blues"), ("EMAIL", "blues@localhost"), ("DATE", "2026-01-01T00:00:00Z"))
}


@dataclass(frozen=True)
class Repository:
    """before, after: commits A and B. files: of A; edited, removed, renamed: how many of them B changes so."""

    path: str
    before: str
    after: str
    files: int
    edited: int
    removed: int
    renamed: int


def build(
    target: Path,
    corpus: Corpus,
    *,
    share: float,
    moved: int = 5,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Repository:
    """Make the repository, or use the one that an earlier call made of the same.

    Args:
        share: of the files that are edited: a line in the middle of the file is written anew, and one is appended.
        moved: files that are removed, and as many others that are renamed.
        say: is told whether an earlier one is used.
    """
    request = {
        "corpus": corpus.xxh3,
        "share": share,
        "moved": moved,
        "seed": seed,
        "objects": "A in a pack, B loose",
        "code": code_of(Path(__file__)),
    }
    make = partial(_make, corpus=corpus, share=share, moved=moved, seed=seed)
    return Repository(str(target), **kept(target, request, make, say=say))


def _make(target: Path, corpus: Corpus, share: float, moved: int, seed: int) -> Facts:
    shutil.copytree(corpus.path, target)
    _git(target, "init", "--quiet", "--initial-branch=main")
    before = _commit(target, "A")
    _git(target, "repack", "-a", "-d", "-q")
    names = files_of(corpus)
    edited, moves = round(share * len(names)), min(moved, (len(names) - 1) // 3)
    drawn = np.random.default_rng(seed).permutation(len(names))[: edited + 2 * moves].tolist()
    for number in drawn[:edited]:
        _edit(target / names[number], number)
    for number in drawn[edited : edited + moves]:
        (target / names[number]).unlink()
    for number in drawn[edited + moves :]:
        path = target / names[number]
        path.rename(path.with_name(f"renamed_{path.name}"))
    changed = {"edited": edited, "removed": moves, "renamed": moves}
    return {"before": before, "after": _commit(target, "B"), "files": len(names), **changed}


def _edit(path: Path, number: int) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[len(lines) // 2] = f"# edit {number}\n"
    path.write_text("".join([*lines, f"\nEDIT = {number}\n"]), encoding="utf-8")


def _commit(folder: Path, message: str) -> str:
    _git(folder, "add", "--all", "--force")  # whatever the files call .gitignore
    _git(folder, "commit", "--quiet", "--no-verify", "--message", message)
    return _git(folder, "rev-parse", "HEAD").strip()


def _git(folder: Path, *words: str) -> str:
    """Run git on its own configuration alone, and without the packing that it starts behind one's back."""
    quiet = ["-c", "gc.auto=0", "-c", "core.autocrlf=false", "-c", "commit.gpgsign=false"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment = clean | WHO_AND_WHEN | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *quiet, *words], capture_output=True, text=True, env=environment, check=True
        )
    except FileNotFoundError:
        raise DataError("git is not installed, and the incremental group needs it; install git") from None
    except subprocess.CalledProcessError as error:
        raise DataError(f"git {words[0]} failed in {str(folder)!r}: {error.stderr.strip()}") from None
    return done.stdout
