"""The meter counts what happens in its block, and the worker calls a function of a file that nobody can import."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import time

import pytest

from tuning.benchmarks import worker
from tuning.benchmarks.worker import MB, Meter

MEASURED = """
import dataclasses

@dataclasses.dataclass
class Pair:
    one: int

def measured(meter, number):
    with meter() as spent:
        block = bytearray(number)
    return {"size": len(block), "growth": spent.growth_mb, "one": Pair(1).one}
"""


def touch(size: int) -> None:
    """Have so much memory for a moment; from the system itself, for Python's own is not given back at once."""
    with mmap.mmap(-1, size) as block:
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1


def test_the_peak_within_the_block_is_counted_and_not_the_one_before():
    touch(60_000_000)
    with Meter() as spent:
        touch(30_000_000)
    assert 29 < spent.growth_mb < 55


def test_wall_and_processor_time_are_told_apart():
    with Meter() as spent:
        time.sleep(0.05)
    assert spent.seconds >= 0.05 > spent.cpu_s >= 0


def test_a_loader_is_timed_from_its_opening_to_its_last_batch():
    read = []

    def make():
        time.sleep(0.02)
        return lambda: read.append(time.sleep(0.001))

    figures = Meter.loader(make, batches=5, batch_bytes=1_000_000)
    assert len(read) == 6  # the first batch is not in the rate
    assert 20 <= figures["open ms"] < figures["first batch ms"]
    assert 0 < figures["MB/s"] <= 1_000_000 / MB / 0.001


def test_a_process_calls_the_function_of_the_file_and_writes_what_it_returns(tmp_path):
    (tmp_path / "measured.py").write_text(MEASURED)
    request, reply = tmp_path / "in", tmp_path / "out"
    asked = {"file": str(tmp_path / "measured.py"), "function": "measured", "arguments": {"number": 7}}
    request.write_text(json.dumps(asked))
    # -I: neither this folder nor the environment, as in a peer's interpreter; Blues need not be there
    subprocess.run([sys.executable, "-I", worker.__file__, str(request), str(reply)], check=True, cwd=tmp_path)
    answer = json.loads(reply.read_text())
    assert answer["size"] == 7 and answer["one"] == 1 and answer["growth"] >= 0


def test_the_worker_needs_nothing_but_the_standard_library():
    code = f"import runpy, sys; runpy.run_path({worker.__file__!r}); print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-I", "-S", "-c", code], text=True).split()
    assert not {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names - {"__main__"}


def test_a_function_that_does_not_exist_is_an_error(tmp_path):
    (tmp_path / "measured.py").write_text(MEASURED)
    with pytest.raises(AttributeError, match="nothing"):
        worker.load_function(str(tmp_path / "measured.py"), "nothing")
