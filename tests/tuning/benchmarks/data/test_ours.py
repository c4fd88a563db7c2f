"""What is measured of Blues does what its figures say; in this process, on tiny data."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from blues.data.storage.store import Store
from blues.data.tokenizer import Tokenizer
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


def test_processor_time_of_processes_that_nobody_waited_for_is_counted():
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {burn!r}]); time.sleep(4)"
    with ours.Descendants() as below:
        process = subprocess.Popen([sys.executable, "-c", parent])
        while below.cpu_s < 0.5 and process.poll() is None:
            time.sleep(0.05)
    process.kill()
    process.wait()
    assert below.cpu_s >= 0.5


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
