"""What is measured of Blues does what its figures say; in this process, on tiny data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from blues.data.storage.store import Store
from blues.data.tokenizer import Tokenizer
from tests.data.datasets import make_store
from tests.tuning.benchmarks.data.test_peers import FIGURES, READING
from tuning.benchmarks.data import ours, tokenizers
from tuning.benchmarks.worker import Meter


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    path = tmp_path_factory.mktemp("made") / "store"
    made = ours.write_store(Meter, str(path), size=40_000, chunk_tokens=2_500, seed=0)
    assert (made["tokens"], made["chunks"]) == (10_000, 4)
    return Store.open(path)


def test_the_made_up_dataset_is_a_whole_one_and_the_same_for_the_same_seed(store, tmp_path):
    assert store.check() == []
    ours.write_store(Meter, str(tmp_path / "again"), size=40_000, chunk_tokens=2_500, seed=0)
    ours.write_store(Meter, str(tmp_path / "other"), size=40_000, chunk_tokens=2_500, seed=1)
    assert Store.open(tmp_path / "again").fingerprint == store.fingerprint
    assert Store.open(tmp_path / "other").fingerprint != store.fingerprint


@pytest.mark.parametrize("function", [ours.read_windows, ours.read_mixture])
def test_loaders_give_the_same_figures(store, function):
    assert set(function(Meter, str(store.path), **READING)) == FIGURES


def test_the_memory_map_reads_the_same_files(store):
    files = [str(path) for path in sorted(store.path.glob("chunks/train-*.tokens"))]
    assert set(ours.read_memmap(Meter, files, **READING)) == FIGURES
    assert set(ours.hash_files(Meter, files, 40_000, "sha256")) == {"GB/s a core", "GB/s", "s"}


def test_a_damaged_dataset_gives_no_figure(store, tmp_path):
    ours.write_store(Meter, str(tmp_path / "store"), size=40_000, chunk_tokens=2_500, seed=0)
    assert ours.check(Meter, str(tmp_path / "store"), 40_000)["s"] > 0
    file = next((tmp_path / "store/chunks").glob("train-*.tokens"))
    tokens = np.fromfile(file, dtype="<u4")
    tokens[0] ^= 1
    tokens.tofile(file)
    with pytest.raises(ValueError, match="its bytes do not match"):
        ours.check(Meter, str(tmp_path / "store"), 40_000)


PREPARING = {"corpus": "source", "workers": 2, "options": []}


def pretend(monkeypatch, text_bytes: int, version: int = 1) -> list[list[str]]:
    """`blues prepare` leaves a dataset with so many bytes of text; returns the commands that are run."""
    commands: list[list[str]] = []

    def run(words):
        commands.append(words)
        place = Path(words[words.index("--data-cache-dir") + 1])
        documents = [[list(range(65, 69))]]
        make_store(place, train=documents, validation=documents)

    monkeypatch.setattr(ours, "blues", run)
    monkeypatch.setattr(Store, "text_bytes", lambda store, split: text_bytes // 2)
    monkeypatch.setattr(Store, "version", version)
    return commands


def test_only_preparing_from_the_beginning_is_measured(tmp_path, monkeypatch):
    commands = pretend(monkeypatch, 8)
    output = tmp_path / "prepared" / "dataset"
    figures = ours.prepare(Meter, size=8, output=str(output), **PREPARING)
    assert len(commands) == 1 and figures["bytes"] == 8 and figures["MB/s"] > 0
    assert figures["MB/s a core"] is None  # here nobody counts what Ray's processes spend
    assert not output.parent.exists()  # nothing is left for the next run
    output.parent.mkdir()  # as a run that was killed would leave it
    with pytest.raises(ValueError, match="only preparing from the beginning is measured"):
        ours.prepare(Meter, size=8, output=str(output), **PREPARING)
    assert len(commands) == 1


def test_one_byte_more_or_less_than_the_corpus_is_no_figure(tmp_path, monkeypatch):
    pretend(monkeypatch, 8)
    with pytest.raises(ValueError, match="8 bytes of text were prepared where the corpus has 9"):
        ours.prepare(Meter, size=9, output=str(tmp_path / "prepared" / "dataset"), **PREPARING)


def test_a_command_that_did_not_do_what_is_measured_is_no_figure(tmp_path, monkeypatch):
    words = ["prepare", "--data-cache-dir", str(tmp_path / "dataset"), "--update"]
    pretend(monkeypatch, 8, version=1)
    with pytest.raises(ValueError, match="has version 1 where the command should have left 2"):
        ours.command(Meter, words, str(tmp_path / "dataset"), version=2)


@pytest.mark.parametrize("makes", [True, False])
def test_following_a_repository_must_do_what_is_measured(tmp_path, monkeypatch, store, makes):
    monkeypatch.setattr(ours, "plan", lambda repository, commit: None)
    monkeypatch.setattr(ours, "prepare_plan", lambda *_, mode: SimpleNamespace(made=not makes, store=store))
    with pytest.raises(ValueError, match="nothing was made" if makes else "something was made"):
        ours.follow(Meter, "repository", "HEAD", str(tmp_path), "update", makes)


@pytest.mark.parametrize("encoder", ["tiktoken", "fastokens"])
def test_tokenizers_count_the_tokens_of_every_file_alone_and_together(tmp_path, encoder):
    pytest.importorskip(encoder)
    texts = [f"def f{number}():\n    return {number}\n" for number in range(9)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.py").write_text(text)
    expected = sum(len(Tokenizer().encode(text)) for text in texts)
    assert tokenizers.threads(Meter, str(tmp_path), encoder, 2)["tokens"] == expected
    answer = tokenizers.processes(Meter, str(tmp_path), encoder, 2)
    assert answer["tokens"] == expected and answer["bytes"] == sum(map(len, texts))
    assert answer["MB/s"] > 0 and answer["MB/s a core"] is None  # here nobody counts what others spend
