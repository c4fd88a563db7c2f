"""Prepare and update on a disk that is too small, in a mount namespace of this process's own.

    unshare --user --map-root-user --mount python -m tests.reliability.full_disk FOLDER

For many sizes of the disk: an error that names it, nothing half-made, what was there stays; with a larger disk the same
command goes on and makes what it makes anywhere.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from blues.cluster import prepare as preparing
from blues.cluster.pool import map_tasks
from blues.data.reading import sources
from blues.data.storage.store import Store
from blues.errors import DataError
from tests.data.datasets import TOKENIZER, snapshot
from tests.reliability.killing import PART_BYTES, write_raw


def resize(disk: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)


def prepare(raw: Path, output: Path, mode: str = "prepare") -> Store:
    return preparing.prepare(sources.plan(raw), output, TOKENIZER, mode=mode).store


def refused(raw: Path, output: Path, mode: str = "prepare") -> bool:
    """Whether it failed for want of space; with the words of an error."""
    try:
        prepare(raw, output, mode)
    except (DataError, OSError) as error:
        assert "No space left" in str(error) and (isinstance(error, OSError) or "free space" in str(error)), error
        return True
    return False


def main(folder: Path) -> None:
    sources.PART_BYTES = PART_BYTES
    preparing.map_tasks = lambda *a, **options: map_tasks(*a, **options | {"here": True})
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    write_raw(folder / "raw")
    expected = snapshot(prepare(folder / "raw", folder / "expected").path)
    whole = sum(-(-len(content) // 4096) * 4 for content in expected.values())
    failures = 0
    for kilobytes in range(8, whole + 60, max(4, whole // 24) // 4 * 4):
        subprocess.run(f"rm -rf {disk}/* {disk}/.[a-z]*", shell=True, check=True)
        resize(disk, kilobytes)
        if refused(folder / "raw", disk / "data"):
            failures += 1
            assert not (disk / "data").exists(), "a dataset has its name only when it is whole"
        resize(disk, 64 << 10)
        assert snapshot(prepare(folder / "raw", disk / "data").path) == expected
    assert failures > 10, failures

    before, fingerprint = snapshot(disk / "data"), Store.open(disk / "data").fingerprint
    for number in range(40):
        (folder / "raw" / f"f{number:03d}.py").write_text(f"changed = {number}\n" * 60)
    newer = prepare(folder / "raw", folder / "newer").fingerprint
    used = int(subprocess.run(["du", "-sk", str(disk)], check=True, capture_output=True).stdout.split()[0])
    failures = 0
    for more in range(0, 400, 40):
        resize(disk, used + more)
        if not refused(folder / "raw", disk / "data", "update"):
            break
        failures += 1
        there = Store.open(disk / "data")
        assert there.check() == [] and there.fingerprint == fingerprint
        kept = snapshot(disk / "data")
        assert {name: kept[name] for name in before} == before
    assert failures > 2, failures
    resize(disk, 64 << 10)
    updated = prepare(folder / "raw", disk / "data", "update")
    assert updated.version == 2 and updated.check() == [] and updated.fingerprint == newer
    print("every full disk was survived")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
