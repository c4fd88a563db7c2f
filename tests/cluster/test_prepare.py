"""Preparing gives the same bytes for any parallelism and after any interruption; what is there is not lost."""

from __future__ import annotations

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

import blues
from blues.cluster import prepare as preparing
from blues.cluster import session
from blues.cluster.pool import map_tasks
from blues.cluster.prepare import count_bytes
from blues.data.merging.merge import merge
from blues.data.preparing import build as building
from blues.data.preparing.build import Progress
from blues.data.preparing.shards import TASKS, Split, TaskResult, place_of, result_file, run_task
from blues.data.reading import sources
from blues.data.reading.readers import Document, Rejected, read_part
from blues.data.reading.sources import Plan
from blues.data.storage import store as st
from blues.data.storage.chunks import CHUNKS
from blues.data.storage.manifest import MANIFEST, partial_directory
from blues.data.tokenizer import Tokenizer
from blues.errors import DataError
from tests.data.datasets import TOKENIZER, make_store, snapshot

OBJECT_STORE = 200 * 2**20
PART_BYTES = 2500
REPOSITORY = Path(blues.__file__).parents[1]


@pytest.fixture(scope="module")
def ray_session():
    with session.connect("local", num_cpus=2, object_store_memory=OBJECT_STORE) as connected:
        yield connected


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """A folder of every kind of file, with rows that cannot be used."""
    folder = tmp_path_factory.mktemp("corpus") / "raw"
    (folder / "code" / "deep").mkdir(parents=True)
    with open(folder / "notes.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["title", "text"])
        writer.writerows((f"note {n}", f'Note {n}: "quoted",\nand a second line. Größe {n}') for n in range(300))
        writer.writerow(["alone"])
    lines = [json.dumps({"text": f"post {n} " + "word " * (n % 9)}) for n in range(200)]
    lines[40], lines[41] = "{broken", json.dumps({"text": "  "})
    (folder / "posts.jsonl").write_text("\n".join(lines))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n{"text": 7}\n', mtime=0))
    table = pa.table({"text": [f"parquet {n}" for n in range(90)] + [None]})
    pq.write_table(table, folder / "table.parquet", row_group_size=30)
    (folder / "code" / "main.go").write_text("package main\n\nfunc main() {}\n")
    (folder / "code" / "deep" / "blob.py").write_bytes(b"\0\1\2")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


REJECTED = [
    ("code/deep/blob.py", None, "NUL byte"),
    ("notes.csv", 301, "wrong number of fields"),
    ("packed.jsonl.gz", 2, "not text"),
    ("posts.jsonl", 41, "invalid JSON"),
    ("posts.jsonl", 42, "empty"),
    ("table.parquet", 91, "no text"),
]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", PART_BYTES)


def in_this_process(*arguments, **options):
    """`map_tasks` without Ray: who does the tasks changes nothing, as the tests with Ray show."""
    return map_tasks(*arguments, **options | {"here": True})


@pytest.fixture
def serial(monkeypatch):
    monkeypatch.setattr(preparing, "map_tasks", in_this_process)


def prepare(*arguments, **options) -> st.Store:
    return preparing.prepare(*arguments, **options).store


@pytest.fixture(scope="module")
def expected(raw, tmp_path_factory) -> Path:
    """The dataset of `raw`, made by one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PART_BYTES", PART_BYTES)
        patch.setattr(preparing, "map_tasks", in_this_process)
        return prepare(sources.plan(raw), tmp_path_factory.mktemp("expected") / "data", TOKENIZER).path


def write_rows(path: Path, rows: int, word: str = "row") -> Plan:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text\n" + "".join(f"{word} number {number}\n" for number in range(rows)))
    return sources.plan(path)


class Interrupt(Exception):
    """Ctrl-C, without stopping pytest."""


def interrupted_after(tasks: int):
    def report(state: Progress) -> None:
        if state.tasks_done >= tasks:
            raise Interrupt

    return report


# With Ray.


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_writes_the_same_bytes(ray_session, raw, expected, tmp_path, workers):
    states: list[Progress] = []
    store = prepare(sources.plan(raw), tmp_path / "data", TOKENIZER, num_workers=workers, report=states.append)
    assert snapshot(store.path) == snapshot(expected)
    assert [path.name for path in tmp_path.iterdir()] == ["data"], "nothing else is left beside it"
    tasks = len(sources.plan(raw).tasks())
    assert tasks > 10 and [state.tasks_done for state in states] == list(range(tasks + 1))
    last = states[-1]
    assert (last.tasks, last.bytes_done, last.resumed) == (tasks, last.bytes, 0)
    assert last.documents == store.manifest["documents"] and last.rejected == len(REJECTED)
    assert last.tokens == store.num_tokens("train") + store.num_tokens("validation")


@pytest.mark.ray
def test_an_interrupted_run_is_finished_by_the_same_command_and_no_task_is_redone(ray_session, raw, expected, tmp_path):
    output, plan = tmp_path / "data", sources.plan(raw)
    with pytest.raises(Interrupt):
        prepare(plan, output, TOKENIZER, num_workers=1, report=interrupted_after(3))
    assert not output.exists(), "a dataset has its name only when it is whole"
    with pytest.raises(DataError, match="is not finished; run the same command again"):
        st.Store.open(output)
    partial = partial_directory(output)
    done = {
        number: result_file(partial, number).stat().st_mtime_ns
        for number in range(len(plan.tasks()))
        if TaskResult.read(partial, number) is not None
    }
    assert len(done) >= 3
    seen: list[tuple[Progress, dict[int, int]]] = []

    def watch(state: Progress) -> None:
        seen.append((state, {number: result_file(partial, number).stat().st_mtime_ns for number in done}))

    prepare(plan, output, TOKENIZER, num_workers=2, report=watch)
    assert seen[0][0].resumed == seen[0][0].tasks_done >= len(done)
    assert all(times == done for _, times in seen)
    assert snapshot(output) == snapshot(expected)


@pytest.mark.ray
def test_a_killed_command_is_finished_by_another(ray_session, raw, expected, tmp_path):
    """SIGKILL of `blues prepare` and all its processes in mid-run; the same dataset is made in the end."""
    output = tmp_path / "data"
    words = ["prepare", "--input-dir", str(raw), "--data-cache-dir", str(output), "--vocab-size", "300"]
    program = (
        "import sys; from blues.data.reading import sources; from blues.cli import main; "
        f"sources.PART_BYTES = {PART_BYTES}; sys.exit(main(sys.argv[1:]))"
    )
    log = tmp_path / "log"
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *words, "--num-workers", "1"],
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
    states: list[Progress] = []
    prepare(sources.plan(raw), output, TOKENIZER, report=states.append)
    assert states[0].resumed >= 3
    assert snapshot(output) == snapshot(expected)


@pytest.mark.ray
def test_what_a_worker_cannot_do_is_one_sentence(ray_session, tmp_path):
    plan = write_rows(tmp_path / "a.csv", 3)
    (tmp_path / "a.csv").write_text("text\nchanged\n")
    with pytest.raises(DataError) as caught:
        prepare(plan, tmp_path / "data", TOKENIZER)
    assert str(caught.value) == f"'{tmp_path / 'a.csv'}' changed while it was being prepared; run the command again"
    assert not (tmp_path / "data").exists()
    store = prepare(sources.plan(tmp_path / "a.csv"), tmp_path / "data", TOKENIZER)
    assert store.manifest["documents"] == 1


# What is in the dataset.


def test_every_row_is_a_document_or_in_quarantine(raw, expected):
    store, plan = st.Store.open(expected), sources.plan(raw)
    records = [record for part in plan.parts() for record in read_part(plan.root, part)]
    documents = {record.id: record.text for record in records if isinstance(record, Document)}
    rejected = [record for record in records if isinstance(record, Rejected)]
    manifest, tokenizer = store.manifest, TOKENIZER.build()
    assert manifest["rows"] == len(records) == manifest["documents"] + sum(manifest["rejected"].values())
    assert manifest["documents"] == len(documents) == 300 + 198 + 1 + 90 + 1
    stored = {
        document.id: tokenizer.decode(document.tokens[:-1])
        for split in st.SPLITS
        for document in store.documents(split)
    }
    assert stored == documents
    lines = [json.loads(line) for line in store.quarantine().read_bytes().splitlines()]
    assert [(line["file"], line["row"], line["reason"]) for line in lines] == REJECTED
    assert len(rejected) == len(REJECTED)
    assert manifest["rejected"] == {reason: 1 for *_, reason in REJECTED}
    assert manifest["sources"][0]["ignored"] == {".png": 1} and manifest["sources"][0]["name"] == "raw"
    assert store.check() == []


def test_a_dataset_holds_no_time_and_no_folder_of_the_machine(raw, expected):
    assert str(raw.parent).encode() not in b"".join(snapshot(expected).values())
    assert set(snapshot(expected)) == {
        MANIFEST,
        *(f"versions/00001/{name}" for name in (MANIFEST, "files.parquet", "quarantine.jsonl")),
    } | {f"chunks/{path.name}" for path in (expected / CHUNKS).iterdir()}


def test_a_table_that_cannot_be_read_is_quarantined_and_the_rest_is_prepared(serial, tmp_path):
    write_rows(tmp_path / "raw" / "good.csv", 5)
    (tmp_path / "raw" / "bad.parquet").write_bytes(b"PAR1 not really")
    store = prepare(sources.plan(tmp_path / "raw"), tmp_path / "data", TOKENIZER)
    [line] = [json.loads(line) for line in store.quarantine().read_bytes().splitlines()]
    assert (line["file"], line["row"], line["reason"]) == ("bad.parquet", None, "table that cannot be read")
    assert store.manifest["rejected"] == {"table that cannot be read": 1} and store.manifest["rows"] == 6


# The split.


def ids_of(store: st.Store, split: str) -> set[str]:
    return {document.id for document in store.documents(split)}


def test_the_split_follows_the_ids_alone(serial, tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    write_rows(path, 400)
    held_out = []
    for number, part_bytes in enumerate((300, 1 << 22)):
        monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
        store = prepare(sources.plan(path), tmp_path / f"data{number}", TOKENIZER, validation_fraction=0.2)
        held_out.append(ids_of(store, "validation"))
        assert ids_of(store, "train").isdisjoint(held_out[-1])
    assert held_out[0] == held_out[1]
    rule = Split.fraction(0.2)
    assert held_out[0] == {f"a.csv:{n}" for n in range(1, 401) if rule.of(place_of(f"a.csv:{n}")) == "validation"}
    assert 40 < len(held_out[0]) < 120


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.5, 0.999999])
@pytest.mark.parametrize("part_bytes", [1, 1 << 22])
def test_two_documents_are_one_of_each_split(serial, tmp_path, monkeypatch, fraction, part_bytes):
    write_rows(tmp_path / "a.csv", 2)
    monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
    store = prepare(sources.plan(tmp_path / "a.csv"), tmp_path / "data", TOKENIZER, validation_fraction=fraction)
    assert [store.num_documents(split) for split in st.SPLITS] == [1, 1] and store.check() == []


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_only_one_document_moves_to_fill_a_split(serial, tmp_path, monkeypatch, fraction):
    monkeypatch.setattr(sources, "PART_BYTES", 100)
    store = prepare(write_rows(tmp_path / "a.csv", 60), tmp_path / "data", TOKENIZER, validation_fraction=fraction)
    assert sorted(store.num_documents(split) for split in st.SPLITS) == [1, 59] and store.check() == []
    places = {split: [place_of(id) for id in ids_of(store, split)] for split in st.SPLITS}
    assert max(places["validation"]) < min(places["train"])


def test_no_share_holds_nothing_out_and_one_document_needs_no_company(serial, tmp_path):
    store = prepare(write_rows(tmp_path / "a.csv", 50), tmp_path / "data", TOKENIZER, validation_fraction=0)
    assert [store.num_documents(split) for split in st.SPLITS] == [50, 0] and store.check() == []
    for fraction in (1e-9, 0.999999):  # hashed to either side
        alone = prepare(
            write_rows(tmp_path / f"{fraction}.csv", 1),
            tmp_path / f"{fraction}",
            TOKENIZER,
            validation_fraction=fraction,
        )
        assert [alone.num_documents(split) for split in st.SPLITS] == [1, 0] and alone.check() == []


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
@pytest.mark.parametrize("ids", [["a"] * 6, ["a", "b"] * 3])
def test_documents_of_one_id_stay_together_also_where_a_split_is_filled(serial, tmp_path, monkeypatch, fraction, ids):
    """Each document is a task of its own, and a move that is interrupted between two tasks ends like any other."""
    (tmp_path / "a.csv").write_text("id,text\n" + "".join(f"{id},text {n}\n" for n, id in enumerate(ids)))
    monkeypatch.setattr(sources, "PART_BYTES", 1)
    plan = sources.plan(tmp_path / "a.csv", id_column="id")
    store = prepare(plan, tmp_path / "data", TOKENIZER, validation_fraction=fraction)
    counts = [store.num_documents(split) for split in st.SPLITS]
    assert counts == ([6, 0] if len(set(ids)) == 1 else [3, 3]) and store.check() == []
    assert ids_of(store, "train").isdisjoint(ids_of(store, "validation"))

    moved = []

    def interrupted(*arguments):
        if len(moved) == 1:
            raise Interrupt
        moved.append(arguments[1])
        return run_task(*arguments)

    monkeypatch.setattr(building, "run_task", interrupted)
    try:
        prepare(plan, tmp_path / "again", TOKENIZER, validation_fraction=fraction)
    except Interrupt:
        monkeypatch.setattr(building, "run_task", run_task)
        prepare(plan, tmp_path / "again", TOKENIZER, validation_fraction=fraction)
    assert snapshot(tmp_path / "again") == snapshot(tmp_path / "data")


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_a_fraction_that_is_no_share_is_refused(tmp_path, fraction):
    with pytest.raises(DataError, match=r"validation fraction .* is not a share; give a number in \[0, 1\)"):
        prepare(write_rows(tmp_path / "a.csv", 2), tmp_path / "data", TOKENIZER, validation_fraction=fraction)


def test_the_rate_counts_what_this_run_did(serial, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 100)
    plan = write_rows(tmp_path / "a.csv", 60)
    with pytest.raises(Interrupt):
        prepare(plan, tmp_path / "data", TOKENIZER, report=interrupted_after(4))
    states: list[Progress] = []
    prepare(plan, tmp_path / "data", TOKENIZER, report=states.append)
    assert states[0].resumed >= 4 and states[0].bytes_resumed == states[0].bytes_done > 0 and states[0].rate == 0
    assert states[-1].bytes_done == states[-1].bytes
    assert states[-1].rate * states[-1].seconds == pytest.approx(states[-1].bytes - states[0].bytes_done)


# What is there already.


def stamps(directory: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.rglob("*")}


def test_the_same_command_again_does_nothing(serial, tmp_path):
    plan = write_rows(tmp_path / "a.csv", 30)
    prepare(plan, tmp_path / "data", TOKENIZER)
    before = stamps(tmp_path / "data")
    prepare(sources.plan(tmp_path / "a.csv"), tmp_path / "data", TOKENIZER, report=pytest.fail)
    assert stamps(tmp_path / "data") == before


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"tokenizer": Tokenizer.Config(vocab_size=400)}, "prepared with another tokenizer; .*--overwrite"),
        ({"validation_fraction": 0.5}, "prepared with another validation_fraction; .*--overwrite"),
        ({"rows": 31}, "already holds another dataset: 'a.csv' .*--update .*--append .*--overwrite"),
        ({"word": "raw"}, "already holds another dataset: 'a.csv' .*--update .*--append .*--overwrite"),
    ],
)
def test_another_dataset_is_refused_and_overwrite_replaces_it(serial, tmp_path, change, differing):
    arguments = {"tokenizer": TOKENIZER, "validation_fraction": 0.1, **change}
    prepare(write_rows(tmp_path / "a.csv", 30), tmp_path / "data", TOKENIZER, validation_fraction=0.1)
    before = snapshot(tmp_path / "data")
    rows, word = arguments.pop("rows", 30), arguments.pop("word", "row")
    plan = write_rows(tmp_path / "a.csv", rows, word)
    with pytest.raises(DataError, match=differing):
        prepare(plan, tmp_path / "data", **arguments)
    assert snapshot(tmp_path / "data") == before

    def old_is_whole(state: Progress) -> None:
        assert snapshot(tmp_path / "data") == before

    prepare(plan, tmp_path / "data", **arguments, overwrite=True, report=old_is_whole)
    fresh = prepare(plan, tmp_path / "fresh", **arguments)
    assert snapshot(tmp_path / "data") == snapshot(fresh.path) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "data", "fresh"]


def test_a_replacement_that_fails_or_is_interrupted_leaves_the_old_dataset(serial, tmp_path):
    prepare(write_rows(tmp_path / "a.csv", 30), tmp_path / "data", TOKENIZER)
    before = snapshot(tmp_path / "data")
    (tmp_path / "empty.csv").write_text("text\n\n \n")
    with pytest.raises(DataError, match="can be used"):
        prepare(sources.plan(tmp_path / "empty.csv"), tmp_path / "data", TOKENIZER, overwrite=True)
    assert snapshot(tmp_path / "data") == before
    with pytest.raises(Interrupt):
        other = write_rows(tmp_path / "b.csv", 200)
        prepare(other, tmp_path / "data", TOKENIZER, overwrite=True, report=interrupted_after(1))
    assert snapshot(tmp_path / "data") == before


def test_an_output_that_holds_something_else_is_never_touched(serial, tmp_path):
    plan = write_rows(tmp_path / "raw" / "a.csv", 5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    make_store(tmp_path / "source", train=[["a"]])
    merge([tmp_path / "source"], tmp_path / "mix", strategy="equal")
    before = snapshot(tmp_path)
    for name, words in (("mine", "something else"), ("mix", "a merged dataset"), ("file", "is a file")):
        for overwrite in (False, True):
            with pytest.raises(DataError, match=rf"{name}'.*{words}.*choose a"):
                prepare(plan, tmp_path / name, TOKENIZER, overwrite=overwrite)
    assert snapshot(tmp_path) == before
    (tmp_path / "empty folder").mkdir()
    assert prepare(plan, tmp_path / "empty folder", TOKENIZER).manifest["documents"] == 5


def test_an_interrupted_run_of_another_request_is_started_anew(serial, tmp_path):
    with pytest.raises(Interrupt):
        prepare(write_rows(tmp_path / "a.csv", 300), tmp_path / "data", TOKENIZER, report=interrupted_after(2))
    states: list[Progress] = []
    other = write_rows(tmp_path / "b.csv", 300, "other")
    store = prepare(other, tmp_path / "data", TOKENIZER, report=states.append)
    assert states[0].resumed == 0
    assert snapshot(store.path) == snapshot(prepare(other, tmp_path / "fresh", TOKENIZER).path)


def test_a_task_whose_files_were_damaged_is_done_again_and_half_written_files_go(serial, raw, expected, tmp_path):
    with pytest.raises(Interrupt):
        prepare(sources.plan(raw), tmp_path / "data", TOKENIZER, report=interrupted_after(4))
    partial = partial_directory(tmp_path / "data")
    [first, second, *_] = sorted((partial / CHUNKS).glob("train-*.tokens"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-4])
    (partial / CHUNKS / ".train-00001-00007.tokens.4711.tmp").write_bytes(b"of a worker that was killed")
    states: list[Progress] = []
    prepare(sources.plan(raw), tmp_path / "data", TOKENIZER, report=states.append)
    assert states[0].resumed == 2 and snapshot(tmp_path / "data") == snapshot(expected)


def test_two_processes_do_not_make_one_dataset(serial, tmp_path):
    plan = write_rows(tmp_path / "a.csv", 3)
    refusal = pytest.raises(DataError, match=r"another process is writing at .*data'; wait for it, or choose another")
    with FileLock(partial_directory(tmp_path / "data").with_suffix(".lock")), refusal:
        prepare(plan, tmp_path / "data", TOKENIZER)
    assert prepare(plan, tmp_path / "data", TOKENIZER).manifest["documents"] == 3


# Nothing to learn from.


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("text\n\n \n \n", "none of the 2 rows of 'a.csv' can be used (2 empty; first: a.csv row 1: empty)"),
        (
            "text,id\nx\n",
            "none of the 1 rows of 'a.csv' can be used (1 wrong number of fields; first: a.csv row 1",
        ),
        ("text\n", "'a.csv' holds no rows; nothing was prepared"),
    ],
)
def test_no_usable_row_is_one_sentence_and_nothing_is_left(serial, tmp_path, content, sentence):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError) as caught:
        prepare(sources.plan(tmp_path / "a.csv"), tmp_path / "out" / "data", TOKENIZER)
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_sizes_are_written_for_people():
    sizes = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 3_400_000: "3.4 MB", 1.2e9: "1.2 GB", 5e15: "5000.0 TB"}
    assert {number: count_bytes(number) for number in sizes} == sizes
