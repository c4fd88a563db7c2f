"""An updated dataset is, document for document and byte for byte, what a preparation of everything gives."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from blues.cluster import prepare as preparing
from blues.cluster.pool import map_tasks
from blues.cluster.prepare import Prepared, prepare
from blues.data.merging.merge import merge, open_dataset
from blues.data.preparing import build as building
from blues.data.preparing.build import Progress
from blues.data.reading import sources
from blues.data.reading.places import Entry
from blues.data.reading.readers import Part
from blues.data.storage import versions
from blues.data.storage.manifest import partial_directory
from blues.data.storage.store import SPLITS, Store
from blues.data.tokenizer import Tokenizer
from blues.errors import DataError
from tests.data.datasets import TOKENIZER, snapshot


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Many tasks, done in this process."""
    monkeypatch.setattr(sources, "PART_BYTES", 2000)
    monkeypatch.setattr(preparing, "map_tasks", lambda *a, **options: map_tasks(*a, **options | {"here": True}))


@pytest.fixture
def raw(tmp_path) -> Path:
    folder, generator = tmp_path / "raw", random.Random(0)
    folder.mkdir()
    for number in range(60):
        write(folder / f"f{number:03d}.py", generator)
    rows = "".join(f"row {number}\n" for number in range(200))
    (folder / "rows.csv").write_text(f"text\n{rows}a,b\n \n")
    (folder / "blob.py").write_bytes(b"\0")
    return folder


def write(path: Path, generator: random.Random) -> None:
    lines = generator.randrange(1, 30)
    path.write_text("".join(f"x{generator.random()} = {number}\n" for number in range(lines)))


def run(raw: Path, output: Path, mode: str = "prepare", **options) -> Prepared:
    return prepare(sources.plan(raw), output, TOKENIZER, mode=mode, **options)


def assert_same(found: Store, expected: Store) -> None:
    """The same content in every respect; only how it lies in chunks may differ."""
    assert found.check() == [] and found.fingerprint == expected.fingerprint
    for split in SPLITS:
        size = expected.num_tokens(split)
        assert found.num_tokens(split) == size
        assert found.read(split, 0, size).tobytes() == expected.read(split, 0, size).tobytes()
        first, second = (
            [(d.id, d.source, d.metadata, d.text_bytes, d.tokens.tolist()) for d in store.documents(split)]
            for store in (found, expected)
        )
        assert first == second
    assert found.quarantine().read_bytes() == expected.quarantine().read_bytes()
    assert versions.files_of(found).equals(versions.files_of(expected))
    for key in ("rows", "documents", "rejected", "sources", "settings"):
        assert found.manifest[key] == expected.manifest[key], key


def test_random_changes_in_many_steps(raw, tmp_path):
    run(raw, tmp_path / "data")
    generator = random.Random(1)
    first = Store.open(tmp_path / "data").fingerprint
    for step in range(8):
        for file in generator.sample(sorted(raw.iterdir()), 4):
            change = generator.random()
            if change < 0.4:
                write(file, generator) if file.suffix == ".py" else file.write_text(f"text\nnew {step}\n \n")
            elif change < 0.6:
                file.unlink()
            elif change < 0.8:
                file.rename(raw / f"renamed{step}-{generator.randrange(999)}{file.suffix}")
            else:
                write(raw / f"added{step}-{generator.randrange(999)}.py", generator)
        updated = run(raw, tmp_path / "data", "update")
        assert_same(updated.store, run(raw, tmp_path / f"fresh{step}").store)
        assert updated.store.version == step + 2 and updated.made
        assert not run(raw, tmp_path / "data", "update").made, "nothing changed since"
    assert Store.open(f"{tmp_path / 'data'}@1").fingerprint == first
    assert Store.open(f"{tmp_path / 'data'}@1").check() == []


def test_only_what_changed_is_read(raw, tmp_path, monkeypatch):
    run(raw, tmp_path / "data")
    before = snapshot(tmp_path / "data" / "chunks")
    (raw / "f007.py").write_text("changed = True\n")
    (raw / "f008.py").unlink()
    read = []
    run_task = building.run_task
    monkeypatch.setattr(preparing, "run_task", lambda *a: read.extend(part.file for part in a[3]) or run_task(*a))
    store = run(raw, tmp_path / "data", "update").store
    assert read == ["f007.py"]
    kept = len(versions.files_of(store)) - 1
    operation = store.manifest["operation"]
    assert {key: operation[key] for key in ("kind", "files_read", "files_removed")} == {
        "kind": "update",
        "files_read": 1 + len(versions.files_of(store)) - 1 - operation["files_kept"],
        "files_removed": 1,
    }
    assert kept - 2 <= operation["files_kept"] <= kept, "files without a usable row may be read again"
    after = snapshot(tmp_path / "data" / "chunks")
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 2


def test_the_parent_and_the_kept_versions_are_told(raw, tmp_path):
    first = run(raw, tmp_path / "data").store
    (raw / "f001.py").write_text("a = 1\n")
    second = run(raw, tmp_path / "data", "update").store
    assert (second.version, second.manifest["parent"]) == (2, first.checksum)
    assert first.manifest["parent"] is None and first.manifest["code"]["blues"]


def test_a_merged_dataset_stays_with_the_version_it_was_made_of(raw, tmp_path):
    run(raw, tmp_path / "data")
    merge([tmp_path / "data"], tmp_path / "mix", strategy="equal")
    before = open_dataset(tmp_path / "mix").fingerprint
    (raw / "f001.py").write_text("a = 1\n")
    run(raw, tmp_path / "data", "update")
    assert open_dataset(tmp_path / "mix").fingerprint == before
    assert open_dataset(tmp_path / "mix").stores[0].version == 1


def test_an_update_starts_from_before_duplicates_were_removed(raw, tmp_path):
    first = run(raw, tmp_path / "data").store
    versions.drop_documents(first, {"train": [0, 5]}, {"kind": "deduplicate"})
    assert not run(raw, tmp_path / "data", "update").made, "the sources did not change"
    (raw / "f001.py").write_text("a = 1\n")
    updated = run(raw, tmp_path / "data", "update").store
    assert updated.version == 3 and updated.manifest["parent"] == Store.open(f"{tmp_path / 'data'}@2").checksum
    assert_same(updated, run(raw, tmp_path / "fresh").store)


def test_further_sources_are_appended_and_updated_one_by_one(raw, tmp_path):
    more = tmp_path / "more"
    more.mkdir()
    for number in range(20):
        write(more / f"m{number}.py", random.Random(number))
    first = run(raw, tmp_path / "data").store
    both = run(more, tmp_path / "data", "append").store
    assert [source["name"] for source in both.manifest["sources"]] == ["raw", "more"] and both.check() == []
    for split in SPLITS:
        added = [document.id for document in both.documents(split)]
        assert added[: first.num_documents(split)] == [document.id for document in first.documents(split)]
    assert both.manifest["documents"] == first.manifest["documents"] + 20
    (raw / "f000.py").unlink()
    (more / "m3.py").write_text("m = 3\n")
    assert run(raw, tmp_path / "data", "update").store.manifest["documents"] == both.manifest["documents"] - 1
    last = run(more, tmp_path / "data", "update").store
    assert last.version == 4 and last.check() == [] and not run(raw, tmp_path / "data", "update").made
    ids = {document.id for split in SPLITS for document in last.documents(split)}
    assert "f000.py" not in ids and {"m3.py", "m4.py", "f001.py"} <= ids

    with pytest.raises(DataError, match="holds a file 'blob.py' of another source already; rename it"):
        run(raw, tmp_path / "data", "append")
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "o.py", random.Random(0))
    with pytest.raises(DataError, match="several sources and none of them is 'other': raw, more; name one of those"):
        run(tmp_path / "other", tmp_path / "data", "update")
    with pytest.raises(DataError, match="holds more than 'raw'; --update it"):
        run(raw, tmp_path / "data")


def test_both_prepare_where_there_is_nothing_yet(raw, tmp_path):
    for mode in ("update", "append"):
        assert run(raw, tmp_path / mode, mode).store.version == 1
    assert (
        snapshot(tmp_path / "update")
        == snapshot(tmp_path / "append")
        == snapshot(run(raw, tmp_path / "new").store.path)
    )


def test_other_settings_are_refused(raw, tmp_path):
    run(raw, tmp_path / "data")
    before = snapshot(tmp_path / "data")
    for options, name in (
        ({"validation_fraction": 0.5}, "validation_fraction"),
        ({"compression": "zstd"}, "compression"),
    ):
        with pytest.raises(DataError, match=rf"prepared with another {name}; name the same, .*--overwrite"):
            run(raw, tmp_path / "data", "update", **options)
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        prepare(sources.plan(raw), tmp_path / "data", Tokenizer.Config(vocab_size=301), mode="update")
    assert snapshot(tmp_path / "data") == before


def test_another_choice_of_columns_reads_just_those_files_again(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    rows = [{"text": f"text {number}", "title": f"title {number}"} for number in range(50)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write(folder / "b.py", random.Random(0))
    prepare(sources.plan(folder), tmp_path / "data", TOKENIZER)
    plan = sources.plan(folder, text_column="title")
    updated = prepare(plan, tmp_path / "data", TOKENIZER, mode="update").store
    assert updated.manifest["operation"]["files_read"] == 1
    assert_same(updated, prepare(plan, tmp_path / "fresh", TOKENIZER).store)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_small_dataset_whose_split_moves_is_made_anew(tmp_path, compression):
    """With two documents the border between the splits depends on both ids: nothing of the old version fits."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.py").write_text(f"{name} = 1\n")
    run(folder, tmp_path / "data", compression=compression)
    for step, name in enumerate("cdefg"):
        (folder / f"{name}.py").write_text(f"{name} = 1\n")
        updated = run(folder, tmp_path / "data", "update", compression=compression).store
        assert_same(updated, run(folder, tmp_path / f"fresh{step}", compression=compression).store)
    for step, name in enumerate("abcdef"):
        (folder / f"{name}.py").unlink()
        updated = run(folder, tmp_path / "data", "update", compression=compression).store
        assert_same(updated, run(folder, tmp_path / f"less{step}", compression=compression).store)


class Interrupt(Exception):
    """Ctrl-C, without stopping pytest."""


def test_an_interrupted_update_leaves_the_version_and_goes_on(raw, tmp_path):
    first = run(raw, tmp_path / "data").store
    for number in range(30):
        (raw / f"f{number:03d}.py").write_text(f"changed = {number}\n" * 40)

    def stop(progress: Progress) -> None:
        if progress.tasks_done >= 4:
            raise Interrupt

    with pytest.raises(Interrupt):
        run(raw, tmp_path / "data", "update", report=stop)
    assert Store.open(tmp_path / "data").checksum == first.checksum and first.check() == []
    states: list[Progress] = []
    updated = run(raw, tmp_path / "data", "update", report=states.append).store
    assert states[0].resumed >= 4 and updated.version == 2
    assert_same(updated, run(raw, tmp_path / "fresh").store)
    assert not partial_directory(tmp_path / "data").exists()


@pytest.mark.parametrize("moment", range(8))
def test_an_update_killed_while_it_is_published_is_done_again(raw, tmp_path, monkeypatch, moment):
    """A stop at any rename: the old version or the new one is there, and the same command ends at the new one."""
    first = run(raw, tmp_path / "data").store
    (raw / "f003.py").write_text("changed = True\n" * 300)
    calls = []
    rename = building.os.replace

    def stop(source, target):
        calls.append(target)
        if len(calls) > moment:
            raise Interrupt
        return rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(building.os, "replace", stop)
        try:
            run(raw, tmp_path / "data", "update")
        except Interrupt:
            there = Store.open(tmp_path / "data")
            assert there.check() == [] and (there.version == 2 or there.checksum == first.checksum)
    updated = run(raw, tmp_path / "data", "update").store
    assert updated.version == 2
    assert_same(updated, run(raw, tmp_path / "fresh").store)


def test_what_another_form_of_dataset_left_half_done_is_begun_anew(raw, tmp_path, monkeypatch):
    def stop(progress: Progress) -> None:
        if progress.tasks_done >= 4:
            raise Interrupt

    def resumed() -> int:
        states: list[Progress] = []
        with pytest.raises(Interrupt):
            run(raw, tmp_path / "data", report=lambda state: states.append(state) or stop(state))
        return states[0].resumed

    assert (resumed(), resumed()) == (0, 4)
    for name, value in (("VERSION", building.VERSION + 1), ("tokenizer_fingerprint", lambda _: "another")):
        monkeypatch.setattr(building, name, value)
        assert (resumed(), resumed()) == (0, 4), name


# What costs nothing.


def test_an_update_makes_nothing_of_files_that_did_not_change(raw, tmp_path, monkeypatch):
    made = []

    def counted(kind):
        initialize = kind.__init__
        monkeypatch.setattr(kind, "__init__", lambda self, *a, **k: made.append(kind) or initialize(self, *a, **k))

    git(raw, "init", "--quiet")
    for number in range(2):
        (raw / "f001.py").write_text(f"changed = {number}\n")
        commit(raw)
        mode = "update" if number else "prepare"
        if number:
            counted(Entry)
            counted(Part)
        prepare(sources.plan(raw, commit="HEAD"), tmp_path / "data", TOKENIZER, mode=mode)
    # The table is looked into for its columns, and the changed file is read.
    assert made.count(Entry) <= 2 and made.count(Part) <= 2


def test_planning_and_updating_import_no_pandas(raw, tmp_path):
    """It takes longer than the rest of the start."""
    (raw / "more.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    program = f"""
import sys
from blues.cli import main
from blues.cluster import pool, prepare
tasks = pool.map_tasks
prepare.map_tasks = lambda *a, **options: tasks(*a, **options | {{"here": True}})
words = ["--data-cache-dir", {str(tmp_path / "data")!r}, "--vocab-size", "300"]
for commit, mode in (("HEAD~1", []), ("HEAD", ["--update"]), ("HEAD~1", ["--update"])):
    assert main(["prepare", "--input-dir", {str(raw)!r}, "--commit", commit, *words, *mode]) == 0
assert main(["prepare", "--input-dir", {str(raw)!r}, *words, "--update"]) == 0
sys.exit("pandas" in sys.modules)
"""
    git(raw, "init", "--quiet")
    for number in range(2):
        (raw / "f001.py").write_text(f"changed = {number}\n" * 20)
        commit(raw)
    (raw / "f002.py").unlink()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Store.open(tmp_path / "data").version == 4


# git.


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit(folder: Path) -> str:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "change")
    return git(folder, "rev-parse", "HEAD")


def test_from_commit_to_commit(raw, tmp_path):
    """Changed, added, deleted and renamed files; nothing is checked out, so the working tree may hold anything."""
    git(raw, "init", "--quiet")
    first = commit(raw)
    (raw / "f001.py").write_text("changed = True\n")
    (raw / "f002.py").unlink()
    (raw / "f003.py").rename(raw / "folder of its own.py")
    (raw / "new.py").write_text("new = True\n")
    second = commit(raw)
    (raw / "f004.py").write_text("not committed\n")

    def at(name: str, revision: str, mode: str = "prepare") -> Prepared:
        return prepare(sources.plan(raw, commit=revision), tmp_path / name, TOKENIZER, mode=mode)

    old = at("data", first).store
    assert old.manifest["sources"][0]["commit"] == first
    updated = at("data", second, "update").store
    assert_same(updated, at("fresh", second).store)
    assert updated.manifest["sources"][0]["commit"] == second
    operation = updated.manifest["operation"]
    assert operation["files_removed"] == 2 and operation["files_read"] <= 3 + 1, "and the one that is never usable"
    back = at("data", first, "update").store
    assert_same(back, at("first", first).store)
    assert back.fingerprint == old.fingerprint and back.version == 3


def test_what_is_told_of_an_update(raw, tmp_path):
    """Why everything is read again where it is, how files were read, and that other options are not another source."""
    few = tmp_path / "few"
    few.mkdir()
    for name in "ab":
        (few / f"{name}.py").write_text(f"{name} = 1\n")
    run(few, tmp_path / "small")
    (few / "c.py").write_text("c = 1\n")
    assert run(few, tmp_path / "small", "update").store.manifest["operation"]["all_again"]
    store = run(raw, tmp_path / "data").store
    [source] = store.manifest["sources"]
    kinds = {(read["kind"], read.get("language")): read["files"] for read in source["read_as"]}
    assert kinds == {("csv", None): 1, ("source", "python"): 61}
    (raw / "f001.py").write_text("a = 1\n")
    assert not run(raw, tmp_path / "data", "update").store.manifest["operation"]["all_again"]
    with pytest.raises(DataError, match="was read from the same files with other options .*--update to read them anew"):
        prepare(sources.plan(raw, encoding="latin-1"), tmp_path / "data", TOKENIZER)
    with pytest.raises(DataError, match="is not UTF-8, which Ray needs; choose another --data-cache-dir"):
        run(raw, tmp_path / "data\udcff")


def test_a_file_named_like_one_of_another_source_is_refused_and_nothing_is_lost(raw, tmp_path):
    more = tmp_path / "more"
    more.mkdir()
    write(more / "m1.py", random.Random(1))
    run(raw, tmp_path / "data")
    both = run(more, tmp_path / "data", "append").store
    write(raw / "m1.py", random.Random(2))
    with pytest.raises(DataError, match="holds a file 'm1.py' of another source already; rename it"):
        run(raw, tmp_path / "data", "update")
    assert Store.open(tmp_path / "data").checksum == both.checksum


def test_a_border_that_was_moved_is_remembered_when_data_are_appended(tmp_path):
    few, more = tmp_path / "few", tmp_path / "more"
    few.mkdir()
    more.mkdir()
    (few / "a.py").write_text("a = 1\n")
    first = run(few, tmp_path / "data", validation_fraction=0.9).store
    for number in range(30):
        write(more / f"m{number}.py", random.Random(number))
    both = run(more, tmp_path / "data", "append", validation_fraction=0.9).store
    moved = first.manifest["settings"]["threshold"] != hex(building.Split.fraction(0.9).threshold)
    assert moved and both.manifest["settings"]["threshold"] == first.manifest["settings"]["threshold"]
    (few / "a.py").write_text("a = 2\n")
    assert run(few, tmp_path / "data", "update", validation_fraction=0.9).store.manifest["operation"]["all_again"]


@pytest.mark.parametrize("moment", range(3))
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_while_a_dataset_takes_its_name_loses_neither_the_old_nor_the_new(
    raw, tmp_path, monkeypatch, moment, overwrite
):
    """A stop before each rename: the next command ends at the new dataset, and reads nothing again once it is whole."""
    if overwrite:
        run(raw, tmp_path / "data")
        write(raw / "f001.py", random.Random(5))
    rename, calls = Path.rename, []

    def stop(path, target):
        if "versions" not in str(target):
            calls.append(target)
            if len(calls) > moment:
                raise Interrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        with contextlib.suppress(Interrupt):
            run(raw, tmp_path / "data", overwrite=overwrite)
    with monkeypatch.context() as patch:
        if not (overwrite and moment == 0):  # then the old dataset is still there, and asked to be replaced once more
            patch.setattr(preparing, "run_task", lambda *_: pytest.fail("read again"))
        again = run(raw, tmp_path / "data", overwrite=overwrite and moment == 0).store
    assert_same(again, run(raw, tmp_path / "fresh").store)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "fresh", "raw"]


def test_a_link_to_a_dataset_is_the_dataset(raw, tmp_path):
    run(raw, tmp_path / "data")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(tmp_path / "data")
    with versions.exclusive(tmp_path / "data"), pytest.raises(DataError, match="another process is writing at"):
        run(raw, tmp_path / "elsewhere" / "link", overwrite=True)
    write(raw / "f001.py", random.Random(5))
    run(raw, tmp_path / "elsewhere" / "link", overwrite=True)
    assert (tmp_path / "elsewhere" / "link").is_symlink()
    assert_same(Store.open(tmp_path / "data"), run(raw, tmp_path / "fresh").store)
