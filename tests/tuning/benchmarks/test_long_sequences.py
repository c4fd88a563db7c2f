"""Every way is measured at every length, and reading in chunks takes less memory."""

from __future__ import annotations

from tests.model.examples import small
from tuning.benchmarks.long_sequences import WAYS, long_sequences, table


def test_every_way_has_a_row_for_every_length_and_chunks_take_less():
    rows = long_sequences((48, 96), model=small(), chunk=16, repeats=1)
    peaks = {(row.way, row.tokens): row.peak_bytes for row in rows}
    assert peaks.keys() == {(way, length) for way in WAYS for length in (48, 96)}
    assert peaks["chunked", 96] < peaks["whole", 96] / 2
    assert peaks["offloaded", 96] == peaks["whole", 96], "nothing moves on a CPU"
    assert all(row.seconds > 0 for row in rows)
    assert len(table(rows).splitlines()) == 1 + len(rows)
