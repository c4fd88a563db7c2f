"""`blues merge --materialize` for `tests.reliability.killing`: killed at random moments, also while it recovers.

python -m tests.cluster.killed_merge FOLDER KILLS SEED
"""

from __future__ import annotations

import sys
from pathlib import Path

from blues.cluster import materialize as writing
from blues.data.merging.merge import combine
from blues.data.merging.mixed_shards import Settings
from blues.data.storage.manifest import partial_directory
from blues.data.storage.store import Store
from blues.data.storage.versions import drop_documents
from blues.errors import DataError
from tests.data.datasets import make_store, snapshot
from tests.reliability import killing


class Materialize(killing.Case):
    """Two datasets, one of them a version of many pieces, written out in many shards."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        writing.code_version = lambda: {"blues": "of a test"}  # a commit in the meantime must not tell runs apart

    def setup(self) -> None:
        for name, chunks in (("code", 4), ("text", 3)):
            train = [[f"{name} {chunk} {n} " + "y" * (n % 50) for n in range(40)] for chunk in range(chunks)]
            make_store(self.folder / name, train=train, validation=[["held", "out"]])
        drop_documents(Store.open(self.folder / "code"), {"train": range(0, 160, 7)}, {"kind": "deduplicate"})
        self._write("expected")

    def _write(self, name: str) -> None:
        combined = combine([self.folder / "code", self.folder / "text"], [0.6, 0.4])
        writing.materialize(combined, self.folder / name, Settings(shard_tokens=500, compression="zstd"))

    def work(self, attempt: int) -> None:
        self._write(f"out{attempt}")

    def sound(self, attempt: int) -> None:
        try:
            found = Store.open(self.folder / f"out{attempt}")
        except DataError:
            return  # there is none yet
        assert found.check() == [] and found.fingerprint == Store.open(self.folder / "expected").fingerprint

    def same(self, attempt: int) -> None:
        assert snapshot(self.folder / f"out{attempt}") == snapshot(self.folder / "expected")
        assert not partial_directory(self.folder / f"out{attempt}").exists()


if __name__ == "__main__":
    killing.CASES["merge"] = Materialize
    killing.main("merge", str(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
