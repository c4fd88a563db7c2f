"""A URL is read as a folder with the same files would be; what a server does not tell or do is made up for."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import zipfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from blues.data.reading import remote, sources
from blues.data.reading.readers import Document, Rejected, read_part
from blues.data.reading.remote import RemoteFiles, redact
from blues.errors import DataError
from tests.data.web import Web, serve


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "DELAYS_S", (0.0, 0.0))


def corpus() -> dict[str, bytes]:
    rows = [{"text": f"row {number}\nof the table", "id": f"r{number}", "n": number} for number in range(500)]
    table, jsonl = io.BytesIO(), "".join(json.dumps(row) + "\n" for row in rows) + "{\n"
    pq.write_table(pa.Table.from_pylist(rows), table, row_group_size=300)
    csv = "text,id,n\n" + "".join(f'"{row["text"]}",{row["id"]},{row["n"]}\n' for row in rows) + "x\n"
    return {
        **{
            "a.py": b"a = 1\n",
            "sub dir/b ünï.go": b"package b\n",
            "sub dir/deeper/c.md": b"# c\n",
            "photo.png": b"png",
        },
        **{
            ".hidden/d.py": b"d\n",
            ".e.py": b"e\n",
            "sub dir/__pycache__/f.py": b"f\n",
            "empty.csv": b"",
            "nul.py": b"\0",
        },
        **{"t.csv": csv.encode(), "t.jsonl": jsonl.encode(), "u.jsonl.gz": gzip.compress(jsonl.encode())},
        **{"t.parquet": table.getvalue(), "long.txt": b"A paragraph.\n\n" * 20_000, "wide.csv": csv.encode("utf-16")},
    }


CORPUS = corpus()
OPTIONS = {"metadata_columns": ("n",), "id_column": "id"}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read_all(plan: sources.Plan) -> list[Document | Rejected]:
    place = pickle.loads(pickle.dumps(plan.root.absolute()))
    return [record for task in plan.tasks() for part in task for record in read_part(place, part)]


@pytest.fixture(params=["everything", "no ranges", "no lengths", "no etags", "small requests", "broken"])
def web(request, monkeypatch):
    options = {
        **{"no ranges": {"ranges": False}, "no lengths": {"lengths": False, "ranges": False}},
        **{"no etags": {"etags": False}, "broken": {"broken": 1, "failing": 1}},
    }.get(request.param, {})
    if request.param != "everything":
        monkeypatch.setattr(remote, "ONE_REQUEST_BYTES", 2000)
    if request.param == "small requests":
        monkeypatch.setattr(remote, "BLOCK_BYTES", 5000)
    with serve({f"/data/{name}": content for name, content in CORPUS.items()}, **options) as web:
        yield web


@pytest.mark.parametrize("part_bytes", [4 << 20, 10_000])
def test_a_web_server_reads_like_a_folder(web: Web, tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
    monkeypatch.setattr(remote, "CUT_ABOVE", part_bytes)
    local = sources.plan(write(tmp_path / "data", CORPUS), **OPTIONS)
    found = sources.plan(f"{web.url}/data/", **OPTIONS)
    assert found.files.select(["file", "bytes"]) == local.files.select(["file", "bytes"])
    assert found.ignored == local.ignored and found.name == local.name == "data"
    assert read_all(found) == read_all(local)
    assert found.source["kind"] == "remote" and found.source["url"] == f"{web.url}/data/"


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "u.jsonl.gz", "t.parquet", "wide.csv"])
def test_one_file_reads_like_its_copy_here(web: Web, tmp_path, name):
    local = sources.plan(write(tmp_path, CORPUS) / name, **OPTIONS)
    found = sources.plan(f"{web.url}/data/{name}?signature=s3cret", **OPTIONS)
    assert read_all(found) == read_all(local)
    assert found.name == name and found.files["file"].to_pylist() == [name]
    assert "s3cret" not in json.dumps(found.source) and "s3cret" not in repr(found)


def test_a_folder_that_cannot_be_listed_is_an_error_not_an_omission():
    files = {"/data/a.py": b"a\n", "/data/in/b.py": b"b\n", "/data/in/deeper/c.py": b"c\n"}
    for folder in ("/data/", "/data/in/", "/data/in/deeper/"):
        with (
            serve(files, forbidden=(folder, folder.rstrip("/"))) as web,
            pytest.raises(DataError, match="access denied"),
        ):
            sources.plan(f"{web.url}/data/")


def test_folders_that_contain_themselves_come_to_an_end():
    files = {f"/data/{'loop/' * depth}a.py": b"a\n" for depth in range(40)}
    with serve(files) as web, pytest.raises(DataError, match="32 levels deep; do they contain themselves"):
        sources.plan(f"{web.url}/data/")


def test_a_second_plan_sees_what_is_new():
    memory = fsspec.filesystem("memory")
    try:
        memory.pipe("/d/a.py", b"a\n")
        assert len(sources.plan("memory://d").files) == 1
        memory.pipe("/d/b.py", b"b\n")
        assert len(sources.plan("memory://d").files) == 2
    finally:
        memory.rm("/d", recursive=True)


def test_other_file_systems_and_archives_within(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/corpus/{name}": content for name, content in CORPUS.items()})
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in CORPUS.items():
            file.writestr(f"in/{name}", content)
    memory.pipe("/packed.zip", archive.getvalue())
    (tmp_path / "packed.zip").write_bytes(archive.getvalue())
    local = sources.plan(write(tmp_path / "corpus", CORPUS), **OPTIONS)
    wanted = read_all(local)
    try:
        for url, shown in (
            ("memory://corpus", "memory://corpus"),
            ("zip://in::memory://packed.zip", "zip://in::memory://packed.zip"),
            (f"zip://in::file://{tmp_path}/packed.zip", "zip://in::packed.zip"),
        ):
            plan = sources.plan(url, **OPTIONS)
            assert read_all(plan) == wanted and plan.ignored == local.ignored
            assert plan.source["url"] == shown and str(tmp_path) not in json.dumps(plan.source)
        assert read_all(sources.plan(f"file://{tmp_path}/corpus", **OPTIONS)) == wanted
        plan = sources.plan("zip://in/t.csv::memory://packed.zip", **OPTIONS)
        assert plan.name == "t.csv" and len(read_all(plan)) == 501
    finally:
        memory.rm("/corpus", recursive=True)
        memory.rm("/packed.zip")


def test_a_source_is_not_read_to_be_hashed(monkeypatch):
    monkeypatch.setattr(remote, "ONE_REQUEST_BYTES", 2000)
    content = b'{"text": "a row"}\n' * 1_000_000
    with serve({"/a.jsonl": content, "/b.py": b"b = 1\n" * 1000}) as web:
        plan = sources.plan(f"{web.url}/a.jsonl")
        assert web.sent("/a.jsonl") <= 2 * remote.BLOCK_BYTES, "only its beginning and end"
        assert len(plan.tasks()) > 3 and web.sent("/a.jsonl") < 1.5 * len(content), "read once to be cut"
        assert sources.plan(f"{web.url}/b.py").files["content"][0].as_py().startswith("remote:")
        assert web.sent("/b.py") <= 2


def test_tokens_of_content_change_with_the_content():
    with serve({"/d/a.py": b"a = 1\n", "/d/b.py": b"a = 1\n"}) as web:
        first = sources.plan(f"{web.url}/d/")
        assert sources.plan(f"{web.url}/d/").files == first.files
        web.files["/d/a.py"] = b"a = 2\n"
        second = sources.plan(f"{web.url}/d/")
        assert pc.equal(first.files["content"], second.files["content"]).to_pylist() == [False, True]
    with serve({"/d/a.py": b"a = 1\n", "/d/b.py": b"a = 1\n"}, etags=False) as web:
        one, two = sources.plan(f"{web.url}/d/").files["content"].to_pylist()
        assert one == two and one.startswith("xxh3:"), "hashed where the server does not say"


@pytest.mark.parametrize("etags", [True, False])
def test_a_file_that_changes_between_planning_and_reading_is_refused(etags):
    with serve({"/a.jsonl": b'{"text": "before"}\n', "/b.csv": b"text\nrow\n"}, etags=etags) as web:
        plan = sources.plan(f"{web.url}/a.jsonl")
        web.files["/a.jsonl"] = b'{"text": "afterwards"}\n'
        with pytest.raises(DataError, match=r"a.jsonl'.*(changed|came of)"):
            read_all(plan)
        del web.files["/a.jsonl"]
        with pytest.raises(DataError, match="a.jsonl': nothing is there"):
            read_all(plan)


def test_a_file_that_changes_while_it_is_read_is_refused(monkeypatch):
    monkeypatch.setattr(remote, "ONE_REQUEST_BYTES", 2000)
    with serve({"/a.jsonl": b'{"text": "before"}\n' * 1000}) as web:
        plan = sources.plan(f"{web.url}/a.jsonl")
        [[part]] = plan.tasks()
        records = read_part(plan.root, part)
        next(records)
        web.files["/a.jsonl"] = b'{"text": "behind"}\n' * 1000
        with pytest.raises(DataError, match="changed while it was being prepared"):
            list(records)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/absent.csv", "absent.csv': nothing is there"),
        ("/secret.csv", "secret.csv': access denied .*403.*credentials come from the environment"),
        ("/absent/", "absent/'"),
        ("/b.csv", "no column 'text'.*--text-column: x, y"),
        ("/c.bin", "c.bin' does not say by its name what it holds; add --format"),
    ],
)
def test_errors_are_sentences_without_secrets(path, message):
    files = {"/secret.csv": b"text\nx\n", "/b.csv": b"x,y\n1,2\n", "/c.bin": b"x"}
    with serve(files, forbidden=("/secret.csv",)) as web:
        host = web.url.removeprefix("http://")
        with pytest.raises(DataError, match=message) as caught:
            sources.plan(f"http://someone:s3cret@{host}{path}?token=t0ken")
    assert "s3cret" not in str(caught.value) and "t0ken" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://x/y", "nosuch://x/y' is no URL that can be read"),
        ("http://127.0.0.1:1/a.csv", "127.0.0.1:1/a.csv': nothing is there .*Cannot connect"),
        ("memory://absent", "memory://absent': nothing is there"),
    ],
)
def test_what_cannot_be_reached_is_a_sentence(url, message):
    with pytest.raises(DataError, match=message) as caught:
        sources.plan(url)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    def refuse(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    with pytest.raises(DataError, match="s3://bucket/x' needs a package that is not installed: Install s3fs"):
        sources.plan("s3://bucket/x")


def test_a_server_that_keeps_failing_is_given_up():
    with serve({"/a.py": b"a = 1\n"}, etags=True) as web:
        plan = sources.plan(f"{web.url}/a.py")
        web.failing = 100
        with pytest.raises(DataError, match="cannot read .*a.py': .*500"):
            read_all(plan)
        assert web.failing == 97, "three tries"


def test_long_answers_are_waited_for_and_settings_of_the_person_kept(monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "http", {"client_kwargs": {"headers": {"Authorization": "x"}}})
    client = RemoteFiles("http://127.0.0.1:1/a.csv")._system().client_kwargs
    assert client["headers"] == {"Authorization": "x"}
    assert client["timeout"].total is None and client["timeout"].sock_read == remote.SILENCE_S


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://u:p@host/a.csv?sig=x#y", "https://host/a.csv"),
        ("zip://in/a::https://u:p@host/x.zip?sig=x", "zip://in/a::https://host/x.zip"),
        ("401, message='Unauthorized', url='http://u:p@h/x?t=1'", "401, message='Unauthorized', url='http://h/x'"),
        ("ssh://git@host/x", "ssh://host/x"),
        ("/a/path?with@signs:in it", "/a/path?with@signs:in it"),
    ],
)
def test_redacting(text, shown):
    assert redact(text) == shown


def test_a_place_travels_and_does_not_tell_its_password():
    place = RemoteFiles("https://u:p4ss@host/x.csv?sig=t0ken")
    assert pickle.loads(pickle.dumps(place)) == place
    for told in (repr(place), json.dumps(place.provenance()), place.where("x.csv"), place.name):
        assert "p4ss" not in told and "t0ken" not in told
