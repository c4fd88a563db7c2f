"""Where the sketches lie: in memory or in a file, and what is said when there is no room."""

from __future__ import annotations

import os

import numpy as np
import pytest

from blues.data.dedup import sketches
from blues.data.dedup.minhash import Settings
from blues.data.dedup.sketches import Sketches
from blues.errors import DataError


@pytest.mark.parametrize("limit", [1 << 28, 0])
def test_what_is_put_is_found(monkeypatch, limit):
    monkeypatch.setattr(sketches, "IN_MEMORY_BYTES", limit)
    rng, wanted = np.random.default_rng(0), Settings(permutations=64)
    keys = rng.integers(0, 2**64, (wanted.bands.bands, 10), dtype=np.uint64)
    marks = rng.integers(0, 256, (10, 64), dtype=np.uint8)
    with Sketches.room_for(10, wanted) as made:
        for start, stop in ((4, 10), (0, 4)):
            made.put(start, keys[:, start:stop], marks[start:stop])
        assert np.array_equal(made.keys_BN, keys) and np.array_equal(made.marks_NP, marks)


def test_a_full_disk_is_one_sentence(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sketches, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    sentence = r"signatures of 1,000,000 documents need 0\.3 GB in .* \(No space left on device\); set TMPDIR"
    with pytest.raises(DataError, match=sentence), Sketches.room_for(1_000_000, Settings()):
        pass
