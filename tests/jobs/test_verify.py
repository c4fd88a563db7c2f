"""`blues verify` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blues.cli import main
from blues.data.merging.merge import merge
from tests.data.datasets import make_store


@pytest.fixture
def path(tmp_path) -> Path:
    return make_store(tmp_path / "notes", train=[["one two", "three"], ["four"]], validation=[["five"]])


def damage(path: Path) -> Path:
    file = path / "chunks" / "train-00001-00001.tokens"
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    return file


def test_a_whole_dataset_is_a_table_and_exit_status_0(path, capsys):
    assert main(["verify", str(path)]) == 0
    out, err = capsys.readouterr()
    rows = [line.split()[:4] for line in out.splitlines()]
    assert ["notes", "train", "1.000", "3"] in rows and ["notes", "validation", "1.000", "1"] in rows
    assert "good: all checksums hold, 4 documents tokenize to what is stored" in out and err == ""


def test_a_damaged_file_is_named_with_the_remedy_and_exit_status_2(path, capsys):
    file = damage(path)
    assert main(["verify", str(path)]) == 2
    out = capsys.readouterr().out
    assert f"{file}: its bytes do not match the checksum in the manifest" in out
    assert "restore the files, or prepare the dataset again" in out and "good" not in out


def test_json_is_for_machines(path, capsys):
    assert main(["verify", str(path), "--sample", "0"]) == 0
    assert "good: all checksums hold; no document was tokenized again" in capsys.readouterr().out
    assert main(["verify", str(path), "--json", "--sample", "2"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["good"] is True and tree["issues"] == [] and tree["retokenized"] == 2
    assert [line["documents"] for line in tree["statistics"]] == [3, 1]
    file = damage(path)
    assert main(["verify", str(path), "--json"]) == 2
    tree = json.loads(capsys.readouterr().out)
    assert tree["good"] is False and [issue["where"] for issue in tree["issues"]] == [str(file)]


def test_a_merged_dataset_is_as_good_as_its_sources(path, tmp_path, capsys):
    other = make_store(tmp_path / "other", train=[["six"]], validation=[["seven"]])
    merge([path, other], tmp_path / "mix", weights=[3, 1])
    assert main(["verify", str(tmp_path / "mix")]) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert ["notes", "train", "0.750"] in rows and ["other", "validation", "0.250"] in rows
    damage(path)
    assert main(["verify", str(tmp_path / "mix")]) == 2
    assert "notes/chunks/train-00001-00001.tokens" in capsys.readouterr().out


def test_a_folder_that_is_no_dataset_is_one_sentence(tmp_path, capsys):
    for name, words in (("absent", "does not exist"), (".", "is not a Blues dataset")):
        assert main(["verify", str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("blues verify: ") and words in err and err.count("\n") == 1


def test_the_page_is_written_also_of_what_is_damaged(path, tmp_path, capsys):
    page = tmp_path / "verify.html"
    assert main(["verify", str(path), "--page", str(page)]) == 0
    assert f"page: {page}" in capsys.readouterr().out and "good: all checksums hold" in page.read_text()
    file = damage(path)
    assert main(["verify", str(path), "--page", str(page), "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["good"] is False and f"page: {page}" in err
    assert file.name in page.read_text()


def test_a_page_that_cannot_be_written_is_refused_before_the_work(path, tmp_path, capsys):
    assert main(["verify", str(path), "--page", str(tmp_path / "absent" / "x.html")]) == 2
    out, err = capsys.readouterr()
    assert "--page: there is no folder" in err and out == ""


def test_several_datasets_and_versions_are_named(path, tmp_path, capsys):
    other = make_store(tmp_path / "other", train=[["one two"]])
    assert main(["verify", str(path), f"{other}@1", "--num-workers", "2"]) == 0
    out = capsys.readouterr().out
    rows = [line.split()[:2] for line in out.splitlines()]
    assert ["notes", "train"] in rows and ["other@1", "train"] in rows
    assert "exact copies of another document: 1;" in out


def test_what_cannot_be_asked_for_is_a_sentence(path, capsys):
    for words, sentence in ((["--num-workers", "0"], "at least 1, got 0"), ([str(path)], "would be checked twice")):
        assert main(["verify", str(path), *words]) == 2
        assert sentence in capsys.readouterr().err
