"""The meter counts what happens in its block, and the worker calls a function of a file that nobody can import."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time

import pytest

from tuning.benchmarks import worker
from tuning.benchmarks.worker import COUNTER, MB, Meter, ProcessorTime

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

BURNING = """
import subprocess, sys, time

BURN = "import time\\nwhile time.process_time() < 0.3: pass"
LEAVE = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {BURN!r}], start_new_session=True)"
FORGET = (
    "import signal, subprocess, sys, time; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
    f"child = subprocess.Popen([sys.executable, '-c', {BURN!r}]); child.wait()"
)

def waited(meter):
    with meter() as spent:
        subprocess.run([sys.executable, "-c", BURN], check=True)
    return {"cpu": spent.cpu_s, "whole": spent.whole_cpu_s}

def forgotten(meter):  # as Ray's raylet forgets its workers
    with meter() as spent:
        subprocess.run([sys.executable, "-c", FORGET], check=True)
    return {"cpu": spent.cpu_s, "whole": spent.whole_cpu_s}

def orphaned(meter):  # in a session of its own, after its parent has ended
    with meter() as spent:
        subprocess.run([sys.executable, "-c", LEAVE], check=True)
        burnt(spent)
    return {"cpu": spent.cpu_s, "whole": spent.whole_cpu_s}

def alive(meter):
    child = subprocess.Popen([sys.executable, "-c", BURN + "\\ntime.sleep(60)"])
    with meter() as spent:
        burnt(spent)
    child.kill()
    child.wait()
    return {"cpu": spent.cpu_s, "whole": spent.whole_cpu_s}

def burnt(spent):
    deadline = time.monotonic() + 20
    while spent.clock.whole and spent.clock.read() - spent._cpu < 0.3 and time.monotonic() < deadline:
        time.sleep(0.02)
"""


def asked(folder, code: str, function: str, **arguments) -> dict:
    """What a process of the worker answers."""
    (folder / "measured.py").write_text(code)
    request, reply = folder / "in", folder / "out"
    request.write_text(json.dumps({"file": str(folder / "measured.py"), "function": function, "arguments": arguments}))
    # -I: neither this folder nor the environment, as in a peer's interpreter; Blues need not be there
    subprocess.run([sys.executable, "-I", worker.__file__, str(request), str(reply)], check=True, cwd=folder)
    return json.loads(reply.read_text())


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
    answer = asked(tmp_path, MEASURED, "measured", number=7)
    assert answer["size"] == 7 and answer["one"] == 1 and answer["growth"] >= 0
    assert answer["processor_time"].startswith((COUNTER, worker.RUSAGE))


@pytest.mark.parametrize("function", ["waited", "forgotten", "orphaned", "alive"])
def test_processor_time_is_that_of_everything_that_was_started_or_none(tmp_path, function):
    answer = asked(tmp_path, BURNING, function)
    if answer["processor_time"] == COUNTER:
        assert 0.3 <= answer["cpu"] == answer["whole"] < 0.9  # the burning, and starts of Python
    else:  # the kernel lets nobody count here: then no such figure, and it is said why
        assert answer["whole"] is None and answer["processor_time"].startswith(f"{worker.RUSAGE}: {COUNTER} ")


def test_without_a_counter_there_is_no_figure_of_what_others_may_have_spent():
    clock = ProcessorTime()
    assert clock.how == worker.RUSAGE and not clock.whole and clock.read() > 0
    with Meter() as spent:
        sum(range(1000))
    assert spent.whole_cpu_s is None and spent.cpu_s >= 0


def test_a_machine_without_the_system_call_is_named(monkeypatch):
    monkeypatch.setattr(worker.platform, "machine", lambda: "pdp11")
    assert ProcessorTime.open() == ProcessorTime("getrusage: perf_event_open is not known on pdp11")


def test_the_counter_and_the_system_agree_about_this_process():
    clock = ProcessorTime.open()
    if not clock.whole:
        pytest.skip(clock.how)
    began, thread = clock.read(), time.thread_time()
    while time.thread_time() - thread < 0.2:
        pass
    assert clock.read() - began == pytest.approx(time.thread_time() - thread, rel=0.1)
    os.close(clock.counter)


def test_the_worker_needs_nothing_but_the_standard_library():
    code = f"import runpy, sys; runpy.run_path({worker.__file__!r}); print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-I", "-S", "-c", code], text=True).split()
    assert not {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names - {"__main__"}


def test_a_function_that_does_not_exist_is_an_error(tmp_path):
    (tmp_path / "measured.py").write_text(MEASURED)
    with pytest.raises(AttributeError, match="nothing"):
        worker.load_function(str(tmp_path / "measured.py"), "nothing")
