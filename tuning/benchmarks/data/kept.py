"""What is made to be measured, and what an earlier run left of it (`blues benchmark data --keep`).

In: a name in the work folder, all that decides what will lie there, and a function that makes it. Out: it is there, and
it is what that very request makes. What an earlier run left counts only if it was asked for by an equal request, and
was finished: a note beside it says so, which is written last and removed first.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from blues.config import write_atomic

NOTE = ".made.json"
Facts = dict[str, Any]
"""What is told of what was made; as JSON has it."""


def kept(
    target: Path,
    request: Mapping[str, Any],
    make: Callable[[Path], Facts],
    *,
    intact: Callable[[Facts], bool] = lambda facts: True,
    say: Callable[[str], None] = lambda line: None,
) -> Facts:
    """The facts of what `make` makes at `target`, or made when it was asked for the same before.

    Args:
        request: all that decides what is made: options, checksums of what it is made of, `code_of` what makes it.
        intact: whether what an earlier run left is still what its facts say.
        say: is told whether something is used again, and why not.
    """
    note = target.with_name(target.name + NOTE)
    wanted = json.loads(json.dumps(dict(request)))
    if note.exists():
        known = json.loads(note.read_bytes())
        differing = [key for key in {**known["request"], **wanted} if known["request"].get(key) != wanted.get(key)]
        if not differing and intact(known["facts"]):
            say(f"  {target.name}: kept from {known['made']}, made of the same")
            return known["facts"]
        say(f"  {target.name}: made anew, what was kept has another {', '.join(differing) or 'content than it had'}")
    elif target.exists():
        say(f"  {target.name}: made anew, what was kept is unfinished")
    note.unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    facts = make(target)
    made = {"request": wanted, "facts": facts, "made": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_atomic(note, json.dumps(made).encode())
    return facts


def clear(folder: Path) -> None:
    """Remove all that was made; the notes first, so that nothing half removed is taken for whole."""
    for note in folder.glob(f"*{NOTE}"):
        note.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def code_of(*paths: Path) -> str:
    """Checksum of Python files, and of those below folders."""
    digest = xxhash.xxh3_128()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            content = file.read_bytes()
            digest.update(f"{file.relative_to(path)}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()
