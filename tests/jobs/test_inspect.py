"""`blues inspect` as a person types it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from blues.cli import main
from tests.data.datasets import make_store


@pytest.fixture
def path(tmp_path) -> Path:
    train = [["one two", "three \x1b[31m"], ["four five six seven eight nine ten"]]
    return make_store(tmp_path / "notes", train=train, validation=[["five"]])


def test_the_overview_is_a_table_with_histograms(path, capsys, tmp_path):
    assert main(["inspect", str(path), "--plot", str(tmp_path / "lengths.png")]) == 0
    out = capsys.readouterr().out
    rows = [line.split()[:4] for line in out.splitlines()]
    assert ["notes", "train", "1.000", "3"] in rows and ["notes", "validation", "1.000", "1"] in rows
    assert "lengths of notes train, documents by tokens" in out and "█" in out
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_documents_are_shown_with_their_tokens(path, capsys):
    assert main(["inspect", str(path), "--documents", "9", "--split", "train"]) == 0
    out = capsys.readouterr().out
    assert out.count("<|endoftext|>") == 3 and "\u2502" in out and "\x1b" not in out and "␛" in out
    assert main(["inspect", str(path), "--id", "train-1-0", "--max-tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert "train-1-0" in out and "tokens are not shown)" in out


def test_a_training_sample_is_shown_with_its_documents(path, capsys):
    assert main(["inspect", str(path), "--window", "0", "--sequence-length", "4", "--packing", "best_fit"]) == 0
    assert "sample 0 of train, packing best_fit, from notes: " in capsys.readouterr().out


def test_json_is_for_machines(path, capsys):
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sources"][0]["splits"][0]["documents"] == 3
    assert main(["inspect", str(path), "--json", "--documents", "2"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    assert main(["inspect", str(path), "--json", "--window", "1", "--sequence-length", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["index"] == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--split", "valid"], "unknown split 'valid'. Did you mean 'validation'?"),
        (["--documents", "0"], "must be at least 1, got 0"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
        (["--window", "0", "--documents", "1"], "--window and --documents are two looks; ask for one at a time"),
        (["--packing", "stream"], "--packing says how a sample is made; name one with --window INDEX"),
        (["--id", "nobody"], "holds no document with the id 'nobody'"),
        (["--plot", "/absent/folder/x.png"], "there is no folder '/absent/folder'"),
        (["--window", "0", "--sequence-length", "100000"], "too few for one sequence"),
    ],
)
def test_what_cannot_be_shown_is_a_sentence(path, words, sentence, capsys):
    assert main(["inspect", str(path), *words]) == 2
    out, err = capsys.readouterr()
    assert sentence in err and "Traceback" not in err and out == ""


def test_a_damaged_index_is_a_sentence_that_names_it(path, capsys):
    file = path / "chunks" / "train-00001-00001.documents.parquet"
    file.write_bytes(bytes(file.stat().st_size))
    assert main(["inspect", str(path)]) == 2
    assert f"{str(file)!r} does not match its checksum" in capsys.readouterr().err


def test_a_terminal_gets_colours_and_one_without_unicode_gets_numbers(path):
    command = [sys.executable, "-m", "blues.cli", "inspect", str(path), "--id", "train-0-1"]
    ours, theirs = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    subprocess.run(command, stdout=theirs, check=True, env=environment)
    os.close(theirs)
    shown = b""
    while b"endoftext" not in shown:
        shown += os.read(ours, 4096)
    os.close(ours)
    assert b"\x1b[30;48;5;153m" in shown and b"\x1b[31m" not in shown
    plain = subprocess.run(command, capture_output=True, check=True, env=environment | {"PYTHONIOENCODING": "ascii"})
    assert plain.stdout.isascii() and rb"\u241b" in plain.stdout
