"""`blues prepare` as a person types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blues.cli import main, run_job
from blues.cluster import session
from blues.data.storage import store as st
from blues.data.storage.store import Store
from tests.data.datasets import make_store, snapshot

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ray_session():
    with session.connect("local", num_cpus=2, object_store_memory=200 * 2**20) as connected:
        yield connected


@pytest.fixture
def notes(tmp_path) -> Path:
    file = tmp_path / "notes.csv"
    rows = "".join(f"{number},body {number}\n" for number in range(40))
    file.write_text("key,body\n" + rows + "40\n41,\n", encoding="utf-8")
    return file


def run(source: Path, output: Path, *words: str) -> int:
    return main(["prepare", "--dataset", str(source), "--data-cache-dir", str(output), *words])


@pytest.mark.ray
def test_prepare_verify_and_again(ray_session, notes, tmp_path, capsys):
    """Columns by name, a smaller vocabulary, a summary that adds up; the same again does nothing."""
    words = ["--text-column", "body", "--id-column", "key", "--vocab-size", "300", "--num-workers", "1"]
    output = tmp_path / "data"
    assert run(notes, output, *words) == 0
    out, err = capsys.readouterr()
    assert f"{output}: 40 documents from 1 files" in out
    assert f"2 rows: 1 empty, 1 wrong number of fields; see {output}/versions/00001/quarantine.jsonl" in out
    assert "40 documents" in err, "the last line of progress"
    store = Store.open(output)
    assert store.tokenizer.vocab_size == 300
    documents = [document for split in st.SPLITS for document in store.documents(split)]
    assert {document.id for document in documents} == {str(number) for number in range(40)}
    texts = {store.tokenizer.build().decode(document.tokens[:-1]) for document in documents}
    assert texts == {f"body {number}" for number in range(40)}
    lines = [json.loads(line) for line in store.quarantine().read_text().splitlines()]
    assert [(line["row"], line["reason"]) for line in lines] == [(41, "wrong number of fields"), (42, "empty")]

    assert main(["verify", str(output)]) == 0
    assert "good: all checksums hold" in capsys.readouterr().out

    before = snapshot(output)
    assert run(notes, output, *words) == 0
    assert "it was there already; nothing was done" in capsys.readouterr().out
    assert run(notes, output, *words, "--validation-fraction", "0.5") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("blues prepare: ") and "--overwrite to replace it" in err
    assert snapshot(output) == before
    assert run(notes, output, *words, "--validation-fraction", "0.5", "--overwrite") == 0
    assert Store.open(output).num_documents("validation") > 10


@pytest.mark.ray
def test_a_folder_is_walked_and_what_is_passed_over_is_told(ray_session, tmp_path, capsys):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("a = 1\n")
    (tmp_path / "src" / "b.md").write_text("# b\n")
    (tmp_path / "src" / "c.png").write_bytes(b"\x89PNG")
    assert main(["prepare", "--input-dir", str(tmp_path / "src"), "--data-cache-dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "2 documents from 2 files" in out and "1 files: 1 .png" in out
    store = Store.open(tmp_path / "out")
    assert store.tokenizer.vocab_size is None, "the whole vocabulary unless asked otherwise"
    assert [store.num_documents(split) for split in st.SPLITS] == [1, 1]


@pytest.mark.ray
def test_no_usable_row_is_one_sentence_and_nothing_is_left(ray_session, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("text\n \n \n")
    assert run(tmp_path / "a.csv", tmp_path / "out" / "data") == 2
    out, err = capsys.readouterr()
    [sentence] = [line for line in err.splitlines() if line.startswith("blues prepare: ")]
    assert out == "" and "none of the 2 rows of 'a.csv' can be used (2 empty; first: a.csv row 1: empty)" in sentence
    assert list((tmp_path / "out").iterdir()) == []


# Refused before Ray is started.


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "has no column 'text'; say which one holds it with --text-column: key, body"),
        (["--text-column", "bodi"], "no column 'bodi' (--text-column). It has: key, body. Did you mean 'body'?"),
        (["--text-column", "body", "--id-column", "id"], "has no column 'id' (--id-column)"),
        (["--format", "jsn"], "unknown format 'jsn'"),
        (["--format", "parquet"], "is damaged or not parquet"),
        (["--text-column", "body", "--vocab-size", "100"], "vocab_size: 100 is outside 257 ... 199999"),
        (["--text-column", "body", "--validation-fraction", "1"], "validation fraction 1.0 is not a share"),
        (["--text-column", "body", "--validation-fraction", "nan"], "validation fraction nan is not a share"),
        (["--text-column", "body", "--num-workers", "0"], "--num-workers must be at least 1, got 0"),
    ],
)
def test_wrong_words_are_one_sentence_and_nothing_is_written(notes, tmp_path, capsys, words, sentence):
    assert run(notes, tmp_path / "out" / "data", *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("blues prepare: ") and sentence in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_missing_empty_or_of_no_known_kind_is_one_sentence(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "void.csv").write_bytes(b"")
    for name, words in (
        ("absent.csv", "there is no file or folder"),
        ("empty", "nothing to read in"),
        ("picture.png", "does not say by its name what it holds; add --format"),
        ("void.csv", "nothing to read in"),
    ):
        assert run(tmp_path / name, tmp_path / "out") == 2
        out, err = capsys.readouterr()
        assert out == "" and name in err and words in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_something_else_is_left_alone(notes, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    make_store(tmp_path / "other", train=[["a"]], validation=[["b"]])
    before = snapshot(tmp_path)
    for name, words in (("mine", "holds something else"), ("other", "holds another dataset"), ("notes.csv", "a file")):
        assert run(notes, tmp_path / name, "--text-column", "body") == 2
        err = capsys.readouterr().err
        assert words in err and "choose a" in err and err.count("\n") == 1
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--dataset", "a.csv"],
        ["--dataset", "a.csv", "--input-dir", "b", "--data-cache-dir", "c"],
        ["--dataset", "a.csv", "--data-cache-dir", "c", "--vocab-size", "many"],
        ["--dataset", "a.csv", "--data-cache-dir", "c", "--txt-column", "body"],
    ],
)
def test_words_that_cannot_be_read_are_wrong_usage(words, capsys):
    with pytest.raises(SystemExit) as ended:
        run_job("prepare", words)
    assert ended.value.code == 2 and "blues prepare" in capsys.readouterr().err


def test_it_runs_as_a_module_and_as_a_file(tmp_path):
    words = ["--dataset", str(tmp_path / "absent.csv"), "--data-cache-dir", str(tmp_path / "out")]
    for command in (["-m", "jobs.prepare"], [str(ROOT / "jobs" / "prepare.py")]):
        done = subprocess.run(
            [sys.executable, *command, *words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("blues prepare: there is no file or folder") and done.stderr.count("\n") == 1
