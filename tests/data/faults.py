"""Faults of every kind in the files of a dataset: what disks, copies, hands and wrong restores do.

In: a folder of datasets. Out: one fault at a time, made in place and taken back, with the files that it touched.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blues.data.storage.manifest import MANIFEST, MIXTURE, write_checked_json

SIGNED = (
    *("version", "parent", "rows", "documents", "rejected", "quarantine", "attachments", "segments"),
    *("splits", "fingerprint", "tokenizer"),
)
"""Parts of a manifest that say something which can be checked against something else."""
MIXED = ("fingerprint", "train_tokens", "weight", "checksum", "version")


@dataclass(frozen=True)
class Fault:
    """What was done, and to which files (any of which may be named)."""

    what: str
    touched: tuple[Path, ...]


class Damage:
    """Makes faults in the datasets below `root`, drawn by `generator`, and undoes them."""

    def __init__(self, root: Path) -> None:
        self.generator = np.random.default_rng(0)
        self.whole = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
        self.files = list(self.whole)
        self.kinds: dict[str, Callable[[], Fault | None]] = {
            "flip": self._flip,
            "truncate": self._truncate,
            "grow": self._grow,
            "insert": self._insert,
            "zero": self._zero,
            "missing": self._missing,
            "swap": self._swap,
            "overwrite": self._overwrite,
            "missing folder": self._missing_folder,
            "edit": self._edit,
            "signed edit": self._signed_edit,
            "signed swap": self._signed_swap,
            "signed mixture": self._signed_mixture,
        }

    @contextmanager
    def fault(self, kind: str) -> Iterator[Fault]:
        """One fault of a kind, which is gone after the `with` block."""
        made = None
        while made is None:  # such as swapping two files that are equal
            made = self.kinds[kind]()
        try:
            yield made
        finally:
            for path, content in self.whole.items():
                if path in made.touched or not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)

    def _one(self, files: list[Path] | None = None) -> Path:
        files = self.files if files is None else files
        return files[int(self.generator.integers(len(files)))]

    def _place(self, content: bytes) -> int:
        return int(self.generator.integers(len(content)))

    def _write(self, what: str, path: Path, content: bytes) -> Fault | None:
        if content == self.whole[path]:
            return None
        path.write_bytes(content)
        return Fault(f"{what} {path}", (path,))

    def _flip(self) -> Fault | None:
        path = self._one()
        content = bytearray(self.whole[path])
        if not content:
            return None
        place, bit = self._place(content), int(self.generator.integers(8))
        content[place] ^= 1 << bit
        return self._write(f"bit {bit} of byte {place} flipped in", path, bytes(content))

    def _truncate(self) -> Fault | None:
        path = self._one()
        content = self.whole[path]
        return self._write("truncated", path, content[: self._place(content)] if content else content)

    def _grow(self) -> Fault | None:
        path = self._one()
        more = self.generator.choice([b"\n", b" ", b"\0" * 4, b"\0" * 4096, self.whole[path] or b"x"])
        return self._write("grown", path, self.whole[path] + bytes(more))

    def _insert(self) -> Fault | None:
        path = self._one()
        content = self.whole[path]
        if not content:
            return None
        place = self._place(content)
        return self._write("a byte inserted and one lost in", path, content[:place] + b" " + content[place:-1])

    def _zero(self) -> Fault | None:
        path = self._one()
        content = bytearray(self.whole[path])
        if not content:
            return None
        start, length = self._place(content), int(self.generator.choice([1, 16, 512]))
        stop = min(len(content), start + length)
        content[start:stop] = bytes(stop - start)
        return self._write("zeros in", path, bytes(content))

    def _missing(self) -> Fault | None:
        path = self._one()
        path.unlink()
        return Fault(f"missing {path}", (path,))

    def _swap(self) -> Fault | None:
        first, second = self._pair()
        if self.whole[first] == self.whole[second]:
            return None
        first.write_bytes(self.whole[second])
        second.write_bytes(self.whole[first])
        return Fault(f"swapped {first} and {second}", (first, second))

    def _overwrite(self) -> Fault | None:
        first, second = self._pair()
        return self._write(f"the content of {second} in", first, self.whole[second])

    def _pair(self) -> tuple[Path, Path]:
        """Two files of one kind, of any versions and datasets."""
        first = self._one()
        return first, self._one([path for path in self.files if path.suffixes == first.suffixes])

    def _missing_folder(self) -> Fault | None:
        folder = self._one([path.parent for path in self.files if path.name != MIXTURE])
        touched = tuple(path for path in self.files if folder in path.parents)
        shutil.rmtree(folder)
        return Fault(f"missing folder {folder}", (folder, *touched))

    def _edit(self) -> Fault | None:
        """A value changed by hand, as an editor leaves it."""
        path = self._one([path for path in self.files if path.name in (MANIFEST, MIXTURE)])
        tree = json.loads(self.whole[path])
        where = self._leaf(tree)
        self._change(tree, where)
        return self._write(f"{where} edited in", path, (json.dumps(tree, indent=1) + "\n").encode())

    def _signed_edit(self) -> Fault | None:
        """A value changed and the manifest signed again, in both copies: it contradicts what lies there."""
        store = self._one([path.parent for path in self.files if path.name == MANIFEST and path.parent / "chunks"])
        while not (store / "chunks").exists():
            store = store.parent
        manifests = [path for path in self.files if path.name == MANIFEST and store in path.parents]
        chosen = self._one(manifests)
        tree = json.loads(self.whole[chosen])
        copies = [path for path in manifests if self.whole[path] == self.whole[chosen]]
        del tree["checksum"]
        key = SIGNED[int(self.generator.integers(len(SIGNED)))]
        where = (key, *self._leaf(tree[key])) if isinstance(tree[key], (dict, list)) and tree[key] else (key,)
        spoken = tuple(store / name for name in self._files_around(tree, where))
        self._change(tree, where)
        spoken += tuple(store / name for name in self._files_around(tree, where))
        for path in copies:
            write_checked_json(path, tree)
        return Fault(f"{where} edited and signed in {copies}", (*copies, *spoken))

    def _signed_swap(self) -> Fault | None:
        """The indexes of two chunks swapped, with their records in the manifest, which is signed again."""
        manifests = [path for path in self.files if path.name == MANIFEST]
        store = self._one([path.parent for path in manifests if (path.parent / "chunks").exists()])
        newest = self.whole[store / MANIFEST]
        tree = json.loads(newest)
        chunks = tree["splits"]["train"]["chunks"]
        first, second = (chunks[int(self.generator.integers(len(chunks)))] for _ in range(2))
        if self.whole[store / first["index"]["file"]] == self.whole[store / second["index"]["file"]]:
            return None
        touched = [store / record[key]["file"] for record in (first, second) for key in ("data", "index")]
        for record, other in ((first, second), (second, first)):
            (store / record["index"]["file"]).write_bytes(self.whole[store / other["index"]["file"]])
        for key in ("bytes", "xxh3"):
            first["index"][key], second["index"][key] = second["index"][key], first["index"][key]
        del tree["checksum"]
        copies = [path for path in manifests if self.whole[path] == newest]
        for path in copies:
            write_checked_json(path, tree)
        return Fault(f"indexes of {first} and {second} swapped and signed", (*touched, *copies))

    def _signed_mixture(self) -> Fault | None:
        path = self._one([path for path in self.files if path.name == MIXTURE])
        tree = json.loads(self.whole[path])
        del tree["checksum"]
        number, key = int(self.generator.integers(len(tree["sources"]))), self.generator.choice(MIXED)
        self._change(tree, ("sources", number, str(key)))
        write_checked_json(path, tree)
        return Fault(f"{key} of source {number} edited and signed in {path}", (path,))

    def _leaf(self, tree: Any) -> tuple[Any, ...]:
        """The way to a value that is drawn from all of a tree."""
        ways = list(_leaves(tree))
        return ways[int(self.generator.integers(len(ways)))]

    def _change(self, tree: Any, where: tuple[Any, ...]) -> None:
        for key in where[:-1]:
            tree = tree[key]
        old = tree[where[-1]]
        other: list[Any] = [None, "", "x", -1, 0, 1, 7, 1 << 70, [], {}, True, 0.5]
        if type(old) is int:
            other += [old + 1, old - 1, old * 2] * 4
        if isinstance(old, str) and old:
            other += [old[:-1] + ("0" if old[-1] != "0" else "1"), old[1:]] * 4
        tree[where[-1]] = next(
            value for value in (other[i] for i in self.generator.permutation(len(other))) if _differs(value, old)
        )

    @staticmethod
    def _files_around(tree: Any, where: tuple[Any, ...]) -> list[str]:
        """The files that the record speaks of in which a value stands."""
        found = []
        for key in where[:-1]:
            tree = tree[key]
            if isinstance(tree, dict):
                found += [tree[name] for name in ("file",) if isinstance(tree.get(name), str)]
                found += [tree[name]["file"] for name in ("data", "index") if isinstance(tree.get(name), dict)]
        return [name for name in found if isinstance(name, str) and "\0" not in name]


def _leaves(tree: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    inner = [found for key, value in items for found in _leaves(value, (*way, key))]
    yield from inner or ([way] if way else [])


def _differs(new: Any, old: Any) -> bool:
    """Whether JSON tells them apart."""
    return json.dumps(new) != json.dumps(old)
