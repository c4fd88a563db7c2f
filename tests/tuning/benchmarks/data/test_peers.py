"""The peers get the same tokens, and are skipped by name where they are not installed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.benchmarks.data import peers
from tuning.benchmarks.worker import Meter

READING = {"windows": 8, "length": 33, "batch": 4, "seed": 1}
FIGURES = {"MB/s", "MB/s a core", "open ms", "first batch ms", "growth MB", "of it files MB"}


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 9))
def test_blocks_are_the_tokens_of_all_files_end_to_end(tmp_path_factory, sizes, length):
    folder = tmp_path_factory.mktemp("files")
    tokens, start = np.arange(sum(sizes), dtype="<u4"), 0
    for number, size in enumerate(sizes):
        tokens[start : start + size].tofile(folder / f"{number}")
        start += size
    blocks = list(peers.blocks_of([str(folder / f"{number}") for number in range(len(sizes))], length))
    assert len(blocks) == len(tokens) // length
    assert np.array_equal(np.concatenate([np.empty(0), *blocks]), tokens[: len(blocks) * length])


@pytest.mark.parametrize("order", ["numbered", "shuffled"])
@pytest.mark.parametrize(
    ("package", "write", "read"),
    [("streaming", peers.write_mds, peers.read_mds), ("litdata", peers.write_litdata, peers.read_litdata)],
)
def test_peers_give_the_same_figures_as_ours(tmp_path, package, write, read, order):
    pytest.importorskip(package)
    np.arange(2_000, dtype="<u4").tofile(tmp_path / "a.tokens")
    write(Meter, [str(tmp_path / "a.tokens")], str(tmp_path / "out"), 33)
    assert set(read(Meter, str(tmp_path / "out"), order, **READING)) == FIGURES


@given(st.integers(0, 12), st.integers(1, 5))
def test_shingles_are_the_runs_of_a_document(length, ngram):
    tokens = np.arange(100, 100 + length, dtype="<u4")
    content = np.concatenate([np.zeros(3, "<u4"), tokens, np.zeros(3, "<u4")]).astype("<u4").tobytes()
    runs = [tokens[start : start + ngram].tobytes() for start in range(max(1, length - ngram + 1))]
    assert peers._shingles(content, 3, 3 + length, ngram) == runs


def test_datasketch_removes_the_later_copy(tmp_path):
    pytest.importorskip("datasketch")
    documents = [np.random.default_rng(seed).integers(0, 9_000, 300, dtype=np.uint32) for seed in (0, 1, 0)]
    np.save(tmp_path / "tokens.npy", np.concatenate(documents))
    np.save(tmp_path / "ends.npy", np.array([300, 600, 900]))
    settings = {"ngram": 5, "permutations": 128, "threshold": 0.7}
    figures = peers.remove_copies(Meter, str(tmp_path), 3600, **settings)
    assert figures["removed"] == [2] and figures["MB/s a core"] > 0


def test_nothing_of_blues_is_needed_where_the_peers_run():
    code = f"from tuning.benchmarks.worker import load_function; load_function({peers.__file__!r}, 'read_mds')"
    code += "; import sys; print(*(name for name in sys.modules if name.startswith(('blues', 'tuning.benchmarks.'))))"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert loaded == ["tuning.benchmarks.worker"]
