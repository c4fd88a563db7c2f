"""A folder is listed in one order whatever lies in it, and nothing in it can make Blues hang, loop or lose a file."""

from __future__ import annotations

import json
import os
import pickle
import socket
from collections import Counter
from pathlib import Path

import pytest

from blues.data.reading import places, sources
from blues.data.reading.places import Entry, Listing, LocalFiles, in_order, shown
from blues.data.reading.readers import Document, Rejected, read_part
from blues.errors import DataError


def read_all(plan: sources.Plan) -> list[Document | Rejected]:
    place = pickle.loads(pickle.dumps(plan.root))
    return [record for task in plan.tasks() for part in task for record in read_part(place, part)]


def bytes_path(folder: Path, name: bytes) -> Path:
    return Path(os.fsdecode(os.fsencode(folder) + b"/" + name))


def test_any_name_is_read_under_a_name_that_is_text(tmp_path: Path):
    names = [
        b"a b.py",
        "ünï.py".encode(),
        b"new\nline.py",
        b"tab\t'\"$(x).py",
        b"caf\xe9.py",
        b"\xff\xfe.py",
        b"-rf.py",
    ]
    folder = tmp_path / "a folder\nwith ünï"
    folder.mkdir()
    for number, name in enumerate(names):
        bytes_path(folder, name).write_text(f"n = {number}\n")
    plan = sources.plan(folder)
    found = {record.id: record.text for record in read_all(plan) if isinstance(record, Document)}
    assert found == {shown(os.fsdecode(name)): f"n = {number}\n" for number, name in enumerate(names)}
    assert "caf\\xe9.py" in found and plan.files["file"].to_pylist() == sorted(found)
    json.dumps([plan.source, plan.files["file"].to_pylist()], ensure_ascii=False).encode()
    one = sources.plan(bytes_path(folder, b"caf\xe9.py"))
    assert [(record.id, record.text) for record in read_all(one)] == [("caf\\xe9.py", "n = 4\n")]  # type: ignore[union-attr]
    assert one.name == "caf\\xe9.py"


def test_names_that_read_alike_are_not_mistaken_for_each_other(tmp_path: Path):
    bytes_path(tmp_path, b"caf\xe9.py").write_text("one\n")
    (tmp_path / "caf\\xe9.py").write_text("two\n")
    with pytest.raises(DataError, match=r"two files would both be called 'caf\\\\xe9.py'"):
        sources.plan(tmp_path)


def test_links_pipes_and_sockets_are_counted_not_opened(tmp_path: Path, monkeypatch):
    tree = tmp_path / "tree"
    (tree / "pkg").mkdir(parents=True)
    (tree / "pkg" / "a.py").write_text("a = 1\n")
    os.mkfifo(tree / "pipe.py")
    os.symlink(tree, tree / "pkg" / "loop")
    os.symlink("loop", tree / "pkg" / "loop2")
    os.symlink("itself.py", tree / "itself.py")
    os.symlink("absent.py", tree / "dangling.py")
    os.symlink("/dev/zero", tree / "endless.py")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tree)  # the path of a socket must be short
        listening.bind("socket.py")
        plan = sources.plan(tree)
    assert [record.id for record in read_all(plan)] == ["pkg/a.py"]  # type: ignore[union-attr]
    assert plan.ignored == {places.LINK: 7}


@pytest.mark.parametrize("name", ["pipe", "/dev/null"])
def test_what_is_no_file_is_a_sentence(tmp_path: Path, name):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is neither a file nor a folder, and a pipe or device cannot be read twice"):
        sources.plan(tmp_path / name, kind="text")


def test_an_empty_path_is_not_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="the path is empty; check --dataset or --input-dir"):
        sources.plan("")


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "loop/x"])
def test_impossible_paths_are_sentences(tmp_path: Path, path):
    os.symlink("loop", tmp_path / "loop")
    with pytest.raises(DataError, match="cannot read|there is no file"):
        sources.plan(tmp_path / path)


@pytest.mark.parametrize("failing", ["scandir", "open"])
def test_what_cannot_be_read_is_an_error_not_an_omission(tmp_path: Path, monkeypatch, failing):
    (tmp_path / "fine.py").write_text("fine\n")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "a.py").write_text("a\n")

    def guarded(function):
        def call(path, *more, **options):
            if isinstance(path, str | Path) and os.fspath(path).endswith(("locked", "locked/a.py")):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return function(path, *more, **options)

        return call

    monkeypatch.setattr(os, failing, guarded(getattr(os, failing)))
    with pytest.raises(DataError, match="cannot read .*locked.*: Permission denied"):
        sources.plan(tmp_path)


def test_a_file_that_vanishes_or_is_replaced_while_it_is_read_is_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 100)
    plan = sources.plan(tmp_path / "a.jsonl")
    [[part]] = plan.tasks()
    records = read_part(plan.root, part)
    next(records)
    (tmp_path / "a.jsonl").write_text('{"text": "b"}\n' * 100)
    with pytest.raises(DataError, match="a.jsonl' changed while it was being prepared"):
        list(records)
    (tmp_path / "a.jsonl").unlink()
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="changed while it was being prepared"):
        plan.root.check(part.entry)


def test_places_travel(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("in/a.py").write_text("a\n")
    plan = sources.plan("in")
    place = pickle.loads(pickle.dumps(plan.root.absolute()))
    monkeypatch.chdir("/")
    assert [record.id for part in plan.parts() for record in read_part(place, part)] == ["a.py"]  # type: ignore[union-attr]
    assert place == LocalFiles(tmp_path / "in") and place.provenance() == {"kind": "files"}


def test_equal_contents_have_equal_tokens(tmp_path: Path):
    for name, content in (("a.py", "x\n"), ("b.py", "x\n"), ("c.py", "y\n")):
        (tmp_path / name).write_text(content)
    a, b, c = sources.plan(tmp_path).files["content"].to_pylist()
    assert a == b != c and a.startswith("xxh3:")


def test_looking_at_all_files_at_once_tells_what_looking_at_each_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number, size in enumerate((0, 1, 99, 100, 101, 200, 1234)):
        (tmp_path / f"f{number}.py").write_bytes(os.urandom(size))
    bytes_path(tmp_path, b"caf\xe9.py").write_text("one\n")
    monkeypatch.setattr(places, "READ_BYTES", 100)
    place = LocalFiles(tmp_path)
    listing = place.entries(lambda _: None, Counter())
    found, contents = place.look(listing)
    assert found.entries() == [place.entry(path) for path in listing.paths] and len(found) == 8
    assert contents == [place.content(entry) for entry in found.entries()]
    again, same = places.Place.look(place, found)
    assert again.entries() == found.entries() and same == contents


def test_a_file_that_became_a_pipe_does_not_hang(tmp_path: Path):
    (tmp_path / "a.py").write_text("a\n")
    place = LocalFiles(tmp_path)
    listing = place.entries(lambda _: None, Counter())
    (tmp_path / "a.py").unlink()
    os.mkfifo(tmp_path / "a.py")
    found, _ = place.look(listing)
    with pytest.raises(DataError, match="changed while it was being prepared"):
        place.check(found.entry(0))


def test_entries_come_in_the_order_of_their_names(tmp_path: Path):
    names = ["b.py", "a/z.py", "a.py", "a/b/c.py", "a-b.py", "B.py", "é.py", "z/é.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x\n")
    ignored: Counter[str] = Counter()
    entries = LocalFiles(tmp_path).entries(lambda name: "no" if name == "B.py" else None, ignored)
    assert list(entries.names) == sorted(set(names) - {"B.py"}) and ignored == {"no": 1}
    assert in_order(Listing.of([Entry("b", "b", 0, ""), Entry("a", "c", 1, "")])).entry(0) == Entry("a", "c", 1, "")


def test_a_great_many_kinds_of_files_are_counted_in_a_bounded_list(tmp_path: Path):
    for number in range(300):
        (tmp_path / f"x.s{number}").touch()
    (tmp_path / "y.s7").touch()
    (tmp_path / "a.py").write_text("a\n")
    ignored = sources.plan(tmp_path).ignored
    assert (
        len(ignored) == 101 and sum(ignored.values()) == 301 and ignored[".s7"] == 2 and ignored["other kinds"] == 200
    )


@pytest.mark.slow
def test_planning_28000_files_is_fast(tmp_path: Path):
    for number in range(28_000):
        if number % 100 == 0:
            (tmp_path / f"d{number // 100}").mkdir()
        (tmp_path / f"d{number // 100}" / f"f{number}.jsonl").write_text('{"text": "a row", "id": 1}\n' * 10)
    import resource
    import time

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    plan = sources.plan(tmp_path, id_column="id")
    tasks = plan.tasks()
    assert time.perf_counter() - began < 30, "about 3 s on an idle machine"
    assert len(plan.parts()) == 28_000 and sum(len(task) for task in tasks) == 28_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10, "KiB"
