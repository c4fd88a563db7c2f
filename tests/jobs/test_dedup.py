"""`blues dedup` as a person types it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from blues.cli import job_parser, main
from blues.data.dedup.minhash import Settings
from blues.data.storage.store import Store
from tests.cluster.test_dedup import text
from tests.data.datasets import make_store, snapshot


@pytest.fixture
def paths(tmp_path) -> list[str]:
    code = make_store(tmp_path / "code", train=[[text(1), text(2), text(1)]], validation=[[text(5)]])
    other = make_store(tmp_path / "text", train=[[text(2, changed=12), text(6)]], validation=[[text(4)]])
    return [str(code), str(other)]


def test_it_prints_what_was_removed_and_where_the_new_versions_are(paths, capsys):
    assert main(["dedup", *paths]) == 0
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert err == ""
    assert ["code", "train", "3", "1", "0", "603", "201", "(33.3%)"] in rows
    assert ["text", "train", "2", "0", "1", "402", "201", "(50.0%)"] in rows
    assert ["code", "1", "0"] in rows and ["text", "1", "0"] in rows
    assert f"{paths[0]}: version 2 without them (1 stays)" in out and "merge again" in out
    assert [Store.open(path).num_documents("train") for path in paths] == [2, 1]


def test_the_second_time_it_says_so(paths, capsys):
    assert main(["dedup", *paths]) == main(["dedup", *paths]) == 0
    assert "the duplicates were removed before, with the same options" in capsys.readouterr().out
    assert [Store.open(path).version for path in paths] == [2, 2]


def test_a_dry_run_with_a_report(paths, tmp_path, capsys):
    before = [snapshot(Path(path)) for path in paths]
    page = tmp_path / "duplicates.html"
    assert main(["dedup", *paths, "--dry-run", "--report", str(page)]) == 0
    out = capsys.readouterr().out
    assert "nothing was changed (--dry-run)" in out and f"examples: {page}" in out
    assert [snapshot(Path(path)) for path in paths] == before
    assert "repeats  code train train-0-1" in page.read_text() and "<ins>" in page.read_text()


def test_the_options_decide_what_is_a_duplicate(paths, capsys):
    assert main(["dedup", *paths, "--exact-only", "--across-only"]) == 0
    assert "nothing to remove; no new version was made" in capsys.readouterr().out
    assert main(["dedup", *paths, "--threshold", "0.99"]) == 0
    assert [Store.open(path).num_documents("train") for path in paths] == [2, 2]


def test_the_defaults_are_those_of_the_library():
    args = job_parser("dedup").parse(["x"])
    assert isinstance(args, argparse.Namespace)
    assert Settings(args.threshold, args.ngram, args.permutations) == Settings()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--threshold", "7"], "threshold 7.0 is not a similarity"),
        (["--ngram", "0"], "ngram 0 is not a number of tokens"),
        (["--num-workers", "0"], "--num-workers must be at least 1"),
        (["--report", "absent/page.html"], "--report: there is no folder 'absent'"),
    ],
)
def test_what_cannot_be_is_one_sentence(paths, capsys, words, sentence):
    assert main(["dedup", *paths, *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("blues dedup: ") and sentence in err and err.count("\n") == 1
    assert [Store.open(path).version for path in paths] == [1, 1]
