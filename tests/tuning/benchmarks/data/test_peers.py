"""The peers get the same tokens, and are skipped by name where they are not installed."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tuning.benchmarks.data.test_ours import FIGURES, READING
from tuning.benchmarks.data import peers
from tuning.benchmarks.worker import Meter


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


def test_nothing_of_blues_is_imported_where_the_peers_run():
    peers_modules = {name for name in vars(peers) if hasattr(vars(peers)[name], "__path__")}
    assert not any(name.startswith(("blues", "tuning")) for name in peers_modules)
    assert "TYPE_CHECKING" in vars(peers) and sys.modules[peers.__name__] is peers
