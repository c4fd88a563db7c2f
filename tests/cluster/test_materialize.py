"""A mixture is written out with the same bytes by any number of workers and after any interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

import blues
from blues.cluster import materialize as writing
from blues.cluster import session
from blues.cluster.materialize import materialize
from blues.data.merging import materialize as materializing
from blues.data.merging.materialize import Progress
from blues.data.merging.merge import Combination, combine, merge, open_dataset
from blues.data.merging.mixed_shards import TASKS, Settings
from blues.data.storage import store as st
from blues.data.storage import versions
from blues.data.storage.manifest import partial_directory
from blues.data.storage.versions import drop_documents
from blues.errors import DataError
from tests.data.datasets import make_store, snapshot

OBJECT_STORE = 200 * 2**20
REPOSITORY = Path(blues.__file__).parents[1]
SHARDS = Settings(shard_tokens=600)


@pytest.fixture(scope="module")
def ray_session():
    with session.connect("local", num_cpus=2, object_store_memory=OBJECT_STORE) as connected:
        yield connected


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Path]:
    """Two datasets, of which one is compressed and has a version without some documents."""
    folder = tmp_path_factory.mktemp("sources")
    code = [[f"code {chunk}.{n} " + "x" * (n * 7 % 40) for n in range(80)] for chunk in range(4)]
    text = [[f"text {chunk}.{n} " + "y" * (n * 5 % 30) for n in range(60)] for chunk in range(3)]
    made = [
        make_store(folder / "code", train=code, validation=[["held", "out"]]),
        make_store(folder / "text", train=text, validation=[["kept"]], compression="zstd"),
    ]
    drop_documents(st.Store.open(made[0]), {"train": range(0, 320, 9)}, {"kind": "deduplicate"})
    return made


@pytest.fixture(scope="module")
def combined(sources) -> Combination:
    return combine(sources, [0.7, 0.3])


CODE = {"blues": "of a test"}
"""A commit while the tests run must not tell two results apart."""


@pytest.fixture(scope="module", autouse=True)
def same_code():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "code_version", lambda: CODE)
        yield


@pytest.fixture(scope="module")
def expected(combined, tmp_path_factory) -> Path:
    """The mixture, written by this process."""
    return materialize(combined, tmp_path_factory.mktemp("expected") / "out", SHARDS).store.path


class Interrupt(Exception):
    """Ctrl-C, without stopping pytest."""


def interrupted_after(shards: int):
    def report(state: Progress) -> None:
        if state.shards_done >= shards:
            raise Interrupt

    return report


# With Ray.


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_writes_the_same_bytes(ray_session, combined, expected, tmp_path, workers):
    states: list[Progress] = []
    made = materialize(combined, tmp_path / "out", SHARDS, num_workers=workers, report=states.append)
    assert snapshot(made.store.path) == snapshot(expected)
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing else is left beside it"
    last = states[-1]
    assert last.shards > 10 and [state.shards_done for state in states] == list(range(last.shards + 1))
    assert last.tokens == last.tokens_done == sum(made.store.num_tokens(split) for split in st.SPLITS)
    assert last.documents_done == made.store.manifest["documents"] and last.resumed == 0


@pytest.mark.ray
def test_what_a_worker_cannot_do_is_one_sentence(ray_session, tmp_path):
    path = make_store(tmp_path / "data", train=[["some text", "and more"]])
    combined = combine([path])
    file = path / "chunks" / "train-00001-00000.tokens"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(DataError) as caught:
        materialize(combined, tmp_path / "out", num_workers=1)
    assert str(caught.value) == f"document 'train-0-0' of '{path}' does not match its checksum; verify that dataset"
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_command_is_finished_by_another(sources, combined, tmp_path):
    """SIGKILL of `blues merge` and all its processes in mid-run; the same dataset is made in the end."""
    output = tmp_path / "out"
    words = ["merge", "--datasets", *map(str, sources), "--weights", "0.7", "0.3", "--output", str(output)]
    words += ["--materialize", "--shard-tokens", "100", "--num-workers", "1"]
    log = tmp_path / "log"
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "blues.cli", *words],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    tasks = partial_directory(output) / TASKS
    give_up = time.monotonic() + 120
    while len(list(tasks.glob("*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < give_up, log.read_text()
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not output.exists()
    with pytest.raises(DataError, match="is not finished"):
        open_dataset(output)
    states: list[Progress] = []
    asked = Settings(shard_tokens=100)
    materialize(combined, output, asked, report=states.append)
    assert 3 <= states[0].resumed < states[0].shards
    assert snapshot(output) == snapshot(materialize(combined, tmp_path / "unbroken", asked).store.path)


# Without.


def test_an_interrupted_run_is_finished_by_the_same_command_and_no_shard_is_redone(combined, expected, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(Interrupt):
        materialize(combined, output, SHARDS, report=interrupted_after(4))
    assert not output.exists(), "a dataset has its name only when it is whole"
    done = {path: path.stat().st_mtime_ns for path in (partial_directory(output) / TASKS).iterdir()}
    assert len(done) == 4
    seen: list[tuple[Progress, dict[Path, int]]] = []
    materialize(
        combined,
        output,
        SHARDS,
        report=lambda state: seen.append((state, {path: path.stat().st_mtime_ns for path in done})),
    )
    assert seen[0][0].resumed == seen[0][0].shards_done == 4
    assert all(times == done for _, times in seen)
    assert snapshot(output) == snapshot(expected)


def test_the_same_again_does_nothing_and_another_needs_overwrite(combined, sources, tmp_path):
    output = tmp_path / "out"
    made = materialize(combined, output, SHARDS)
    before = snapshot(output)
    again = materialize(combined, output, SHARDS)
    assert again.progress is None and again.store.checksum == made.store.checksum
    other = combine(sources, [0.5, 0.5])
    with pytest.raises(DataError, match="already holds another mixture; choose another directory or pass --overwrite"):
        materialize(other, output, SHARDS)
    assert snapshot(output) == before
    with pytest.raises(Interrupt):  # what is replaced stays whole until the new one is
        materialize(other, output, SHARDS, overwrite=True, report=interrupted_after(2))
    assert snapshot(output) == before
    replaced = materialize(other, output, SHARDS, overwrite=True)
    assert replaced.progress is not None and replaced.progress.resumed == 2
    assert replaced.store.fingerprint != made.store.fingerprint and replaced.store.check() == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_mixture_can_be_written_out_in_its_own_place(sources, tmp_path):
    merge(sources, tmp_path / "mix", weights=[0.7, 0.3])
    combined = combine([tmp_path / "mix"])
    with pytest.raises(DataError, match="already holds a merged dataset"):
        materialize(combined, tmp_path / "mix")
    store = materialize(combined, tmp_path / "mix", overwrite=True).store
    assert store.check() == [] and open_dataset(tmp_path / "mix").names == ("mix",)
    again = combine([tmp_path / "mix"])
    with pytest.raises(DataError, match="mix' is one of the datasets that are merged; choose another directory"):
        materialize(again, tmp_path / "mix", Settings(keep_order=True), overwrite=True)
    assert st.Store.open(tmp_path / "mix").checksum == store.checksum


def test_a_disk_that_is_full_outside_of_the_shards_is_one_sentence_too(combined, expected, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("Error writing bytes to file. Detail: [errno 28] No space left on device")  # as Arrow says it

    for module, name in ((materializing, "write_rows"), (versions, "write_version")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(DataError, match=r"cannot write .*\.out\.partial': .*No space left .* free space"):
                materialize(combined, tmp_path / "out", SHARDS)
        assert not (tmp_path / "out").exists()
    assert snapshot(materialize(combined, tmp_path / "out", SHARDS).store.path) == snapshot(expected)


def test_only_one_process_writes(combined, tmp_path):
    lock = FileLock(partial_directory(tmp_path / "out").with_suffix(".lock"))
    with lock, pytest.raises(DataError, match="another process is writing at .*out'; wait for it"):
        materialize(combined, tmp_path / "out")


def test_small_work_is_done_here_and_large_work_or_named_workers_are_not(combined, tmp_path, monkeypatch):
    where = []
    monkeypatch.setattr(writing, "map_tasks", lambda *a, here, **_: where.append(here) or iter(()))
    monkeypatch.setattr(writing.Materialization, "publish", lambda *_: None)
    materialize(combined, tmp_path / "out")
    materialize(combined, tmp_path / "out", num_workers=2)
    monkeypatch.setattr(writing, "HERE_BYTES", 100)
    materialize(combined, tmp_path / "out")
    assert where == [True, False, False]
