"""Kill a piece of work with SIGKILL at random moments, again and again, and look at what lies there each time.

    python -m tests.reliability.killing CASE FOLDER KILLS SEED

The same folder is gone on with after each kill, so work is also killed while it recovers from a kill. This process
only forks; everything else happens in children, so that they start from a process without threads. A case that fails
prints why and ends with status 1; otherwise the last line says how many kills there were and how many runs ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import blues
from blues.cluster import materialize as materializing
from blues.cluster import prepare as preparing
from blues.cluster.pool import map_tasks
from blues.data.merging.merge import combine
from blues.data.merging.mixed_shards import Settings
from blues.data.mixture.batches import Mixture
from blues.data.reading import sources
from blues.data.storage.manifest import partial_directory
from blues.data.storage.store import SPLITS, Store
from blues.errors import DataError
from tests.data.datasets import TOKENIZER, snapshot
from tests.training import tiny
from tests.training.test_trainer import assert_identical, train

PART_BYTES = 3000


class Case:
    """Work in a folder: `attempt` numbers the outputs that were begun."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sources.PART_BYTES = PART_BYTES
        for module in (preparing, materializing):  # a commit in between would tell them apart
            module.code_version = lambda: {"blues": blues.__version__}
        preparing.map_tasks = lambda *a, **options: map_tasks(*a, **options | {"here": True})

    def setup(self) -> None:
        """Inputs, and the result of an unbroken run."""
        raise NotImplementedError

    def begin(self, attempt: int) -> None:
        """What is there before the first run of an attempt."""

    def work(self, attempt: int) -> None:
        """What is killed."""
        raise NotImplementedError

    def sound(self, attempt: int) -> None:
        """After a kill: nothing readable is wrong."""
        raise NotImplementedError

    def same(self, attempt: int) -> None:
        """After a run that ended: the result is that of an unbroken run."""
        raise NotImplementedError


def write_raw(folder: Path, seed: int = 0) -> None:
    """Some files of every kind, a few of them with rows that cannot be used."""
    folder.mkdir()
    generator = random.Random(seed)
    for number in range(50):
        lines = "".join(f"x{generator.random()} = {number}\n" for _ in range(generator.randrange(1, 40)))
        (folder / f"f{number:03d}.py").write_text(lines)
    (folder / "rows.csv").write_text("text\n" + "".join(f"row {n} {seed}\n" for n in range(400)) + "a,b\n \n")
    (folder / "lines.jsonl").write_text("".join(f'{{"text": "line {n}"}}\n' for n in range(300)) + "{\n")


class Prepare(Case):
    """`blues prepare` of a new dataset."""

    def setup(self) -> None:
        write_raw(self.folder / "raw")
        self._prepare("expected")

    def _prepare(self, name: str) -> None:
        preparing.prepare(sources.plan(self.folder / "raw"), self.folder / name, TOKENIZER, compression="zstd")

    def work(self, attempt: int) -> None:
        self._prepare(f"out{attempt}")

    def sound(self, attempt: int) -> None:
        try:
            found = Store.open(self.folder / f"out{attempt}")
        except DataError:
            return  # there is none yet
        assert found.check() == [] and found.fingerprint == Store.open(self.folder / "expected").fingerprint

    def same(self, attempt: int) -> None:
        assert snapshot(self.folder / f"out{attempt}") == snapshot(self.folder / "expected")
        assert not partial_directory(self.folder / f"out{attempt}").exists()


class Update(Case):
    """`blues prepare --update` of a dataset whose source has changed."""

    def setup(self) -> None:
        raw = self.folder / "raw"
        write_raw(raw)
        preparing.prepare(sources.plan(raw), self.folder / "old", TOKENIZER)
        for number in range(0, 50, 2):
            (raw / f"f{number:03d}.py").write_text(f"changed = {number}\n" * (number + 1))
        (raw / "f001.py").unlink()
        (raw / "f003.py").rename(raw / "renamed.py")
        (raw / "rows.csv").write_text("text\n" + "".join(f"new row {n}\n" for n in range(300)) + " \n")
        preparing.prepare(sources.plan(raw), self.folder / "expected", TOKENIZER)

    def begin(self, attempt: int) -> None:
        shutil.copytree(self.folder / "old", self.folder / f"out{attempt}")

    def work(self, attempt: int) -> None:
        plan = sources.plan(self.folder / "raw")
        preparing.prepare(plan, self.folder / f"out{attempt}", TOKENIZER, mode="update")

    def sound(self, attempt: int) -> None:
        found = Store.open(self.folder / f"out{attempt}")
        expected = Store.open(self.folder / ("old" if found.version == 1 else "expected"))
        assert found.check() == [] and found.fingerprint == expected.fingerprint

    def same(self, attempt: int) -> None:
        found, expected = (Store.open(self.folder / name) for name in (f"out{attempt}", "expected"))
        assert found.version == 2 and found.check() == [] and found.fingerprint == expected.fingerprint
        for split in SPLITS:
            size = expected.num_tokens(split)
            assert found.read(split, 0, size).tobytes() == expected.read(split, 0, size).tobytes()
        assert found.quarantine().read_bytes() == expected.quarantine().read_bytes()


class Merge(Case):
    """`blues merge --materialize` of two datasets."""

    def setup(self) -> None:
        for number, name in enumerate(("a", "b")):
            write_raw(self.folder / f"raw-{name}", seed=number)
            preparing.prepare(sources.plan(self.folder / f"raw-{name}"), self.folder / name, TOKENIZER)
        self._merge("expected")

    def _merge(self, name: str) -> None:
        combined = combine([self.folder / "a", self.folder / "b"], [0.7, 0.3])
        materializing.materialize(combined, self.folder / name, Settings(shard_tokens=1000))

    def work(self, attempt: int) -> None:
        self._merge(f"out{attempt}")

    sound = Prepare.sound
    same = Prepare.same


class Training(Case):
    """A training run: the batches of each step and the weights at the end are those of an unbroken run."""

    def setup(self) -> None:
        tiny.make_dataset(self.folder / "data")
        self._train("expected")

    def _train(self, name: str) -> None:
        log, read = os.open(self.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), Mixture.read

        def logged(mixture, sources, windows):
            found = read(mixture, sources, windows)
            digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in found if tensor is not None))
            os.write(log, f"{mixture.split} {sources.tolist()} {windows.tolist()} {digest.hexdigest()}\n".encode())
            return found

        Mixture.read = logged
        steps = {"steps": 40, "checkpoint_every": 2, "validate_every": 20, "log_every": 10}
        exp = tiny.experiment(self.folder / "data" / "both", **steps)
        outcome, _ = train(exp, self.folder / name)
        assert outcome.finished

    def work(self, attempt: int) -> None:
        self._train(f"out{attempt}")

    def sound(self, attempt: int) -> None:
        self._compare_batches(attempt)

    def _compare_batches(self, attempt: int) -> set[str]:
        expected = set((self.folder / "expected.log").read_text().splitlines())
        log = self.folder / f"out{attempt}.log"
        lines = set(log.read_text().splitlines()) if log.exists() else set()
        assert lines <= expected, f"other batches: {sorted(lines - expected)[:3]}"
        return expected - lines

    def same(self, attempt: int) -> None:
        assert not self._compare_batches(attempt), "every batch was read"
        assert_identical(self.folder / f"out{attempt}", self.folder / "expected")


CASES: dict[str, type[Case]] = {"prepare": Prepare, "update": Update, "merge": Merge, "training": Training}


def start(work: Callable[[], None]) -> int:
    """Do something in a child; its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(work: Callable[[], None], what: str) -> None:
    """Do something in a child, which must succeed."""
    _, status = os.waitpid(start(work), 0)
    if status:
        raise SystemExit(f"{what} failed")


def main(name: str, folder: str, kills: int, seed: int) -> None:
    case, generator = CASES[name](Path(folder)), random.Random(seed)
    finish(case.setup, "the unbroken run")
    attempt, killed, ended = 0, 0, 0
    began = time.monotonic()
    finish(lambda: (case.begin(0), case.work(0)), "a first run")
    longest = time.monotonic() - began
    finish(lambda: case.same(0), "the comparison of a first run")
    while killed < kills:
        attempt += 1
        finish(lambda: case.begin(attempt), "the beginning")  # noqa: B023  (it is over before the next attempt)
        status = -1
        while status and killed < kills:
            child = start(lambda: case.work(attempt))  # noqa: B023
            time.sleep(generator.uniform(0, longest))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status) and status:
                raise SystemExit(f"a run after {killed} kills failed")
            killed += status != 0
            finish(lambda: case.sound(attempt), f"what is there after {killed} kills")  # noqa: B023
        finish(lambda: case.work(attempt), f"the last run after {killed} kills")  # noqa: B023
        finish(lambda: case.same(attempt), f"the comparison after {killed} kills")  # noqa: B023
        ended += 1
    print(f"{killed} kills, {ended} runs ended as an unbroken one")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
