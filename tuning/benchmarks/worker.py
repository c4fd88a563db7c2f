"""The process in which one measurement is made: `python -P worker.py REQUEST REPLY`.

In: a JSON file that names a function of a Python file and its arguments. Out: a JSON file with the figures that the
function returned. It knows the standard library alone, and loads the function by its file's path: a peer is measured
in an environment of its own where Blues is not installed. What processor time means is said at `ProcessorTime`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import platform
import resource
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

STATUS, FORGET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
KIB, MB = 1 << 10, 1e6
COUNTER, RUSAGE = "perf_event_open", "getrusage"
SYSTEM_CALLS = {"x86_64": 298, "aarch64": 241}
"""The number of perf_event_open(2), for which the C library has no function."""
ATTRIBUTES = struct.Struct("=IIQQQQQ80x")
"""`struct perf_event_attr` of linux/perf_event.h: type, size, config, period, sample_type, read_format, flags."""
SOFTWARE, TASK_CLOCK = 1, 1
INHERIT, NOT_KERNEL, NOT_HYPERVISOR, CLOSE_ON_EXEC = 1 << 1, 1 << 5, 1 << 6, 1 << 3


@dataclass(frozen=True)
class Memory:
    """What of this process is in memory, in bytes: now, its highest point, and how much of now is pages of files."""

    resident: int
    peak: int
    files: int

    @classmethod
    def read(cls) -> Memory:
        """As the kernel counts it (proc(5): VmRSS, VmHWM, RssFile)."""
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
        resident, peak, files = (int(fields[name].split()[0]) * KIB for name in ("VmRSS", "VmHWM", "RssFile"))
        return cls(resident, peak, files)


@dataclass(frozen=True)
class ProcessorTime:
    """What processor time is in all benchmarks: seconds, in the program and in the kernel for it, of all threads of
    this process and of every process that it started, directly or through others.

    `counter` is a task clock of the kernel (perf_event_open(2)) that threads and processes inherit. It counts, to the
    nanosecond, those that live, that ended, that were orphaned, and those that nobody waited for. Ray makes that
    necessary: its raylet ignores the end of its workers, and the system then forgets what they spent, which is most.

    Where the kernel allows no counter (kernel.perf_event_paranoid above 2, a container's filter), getrusage(2) is
    asked: this process, and those that were waited for. `how` says so, and `whole` is False; a figure of work that
    Ray's processes do is then left out.
    """

    how: str = RUSAGE
    counter: int | None = None

    @classmethod
    def open(cls) -> ProcessorTime:
        """To be called while this process has one thread: what runs already does not inherit the counter."""
        number = SYSTEM_CALLS.get(platform.machine())
        if number is None:
            return cls(f"{RUSAGE}: {COUNTER} is not known on {platform.machine()}")
        # A task clock goes on in the kernel whatever the flags say; without NOT_KERNEL only root may ask.
        flags = INHERIT | NOT_KERNEL | NOT_HYPERVISOR
        wanted = ATTRIBUTES.pack(SOFTWARE, ATTRIBUTES.size, TASK_CLOCK, 0, 0, 0, flags)
        system = ctypes.CDLL(None, use_errno=True)
        itself, any_processor, no_group = 0, -1, -1
        counter = system.syscall(number, wanted, itself, any_processor, no_group, ctypes.c_ulong(CLOSE_ON_EXEC))
        if counter < 0:
            return cls(f"{RUSAGE}: {COUNTER} says {os.strerror(ctypes.get_errno())!r}")
        return cls(COUNTER, counter)

    @property
    def whole(self) -> bool:
        return self.counter is not None

    def read(self) -> float:
        """Up to now, in seconds."""
        if self.counter is not None:
            (nanoseconds,) = struct.unpack("=Q", os.read(self.counter, 8))
            return nanoseconds / 1e9
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


class Meter:
    """Measures a `with` block: `seconds` of wall time, `cpu_s` of processor time, growth of memory in MB.

    `cpu_s`: see `ProcessorTime`. `whole_cpu_s` is the same for work that is done by processes that this one may not
    have waited for: None where they could not be counted. `growth_mb` is the highest point of this process in the block
    less the start; `files_mb` the part of the growth that is pages of files, which the kernel takes back when it needs
    them.
    """

    clock: ClassVar[ProcessorTime] = ProcessorTime()
    seconds = cpu_s = growth_mb = files_mb = 0.0

    def __enter__(self) -> Meter:
        FORGET_PEAK.write_text("5")  # proc(5): the peak starts over from what is resident now
        self._memory = Memory.read()
        self._cpu, self._wall = self.clock.read(), time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.seconds, self.cpu_s = time.perf_counter() - self._wall, self.clock.read() - self._cpu
        now = Memory.read()
        self.growth_mb = max(0, now.peak - self._memory.resident) / MB
        self.files_mb = max(0, now.files - self._memory.files) / MB

    @property
    def whole_cpu_s(self) -> float | None:
        return self.cpu_s if self.clock.whole else None

    @classmethod
    def loader(cls, make: Callable[[], Callable[[], Any]], batches: int, batch_bytes: int) -> dict[str, float]:
        """Figures of a loader: `make` opens it and returns what delivers the next batch, of `batch_bytes`.

        The first batch is timed for itself: some loaders do their opening then. Memory counts from before the opening.
        """
        with cls() as spent:
            began = time.perf_counter()
            read = make()
            opened = time.perf_counter()
            read()
            first, cpu = time.perf_counter(), cls.clock.read()
            for _ in range(batches):
                read()
            seconds, cpu_s = time.perf_counter() - first, cls.clock.read() - cpu
        return {
            "MB/s": batches * batch_bytes / MB / seconds,
            "MB/s a core": batches * batch_bytes / MB / cpu_s,
            "open ms": 1e3 * (opened - began),
            "first batch ms": 1e3 * (first - began),
            "growth MB": spent.growth_mb,
            "of it files MB": spent.files_mb,
        }


def load_function(file: str, name: str) -> Callable[..., dict[str, Any]]:
    """The function `name` of the Python file."""
    spec = importlib.util.spec_from_file_location(f"measured_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None, f"{file} is no Python file"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return getattr(module, name)


def main(request: str, reply: str) -> None:
    """Call what the request names, with `Meter` as the first argument; write what it returns, and by what processor
    time was counted."""
    Meter.clock = ProcessorTime.open()
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    answer = load_function(asked["file"], asked["function"])(Meter, **asked["arguments"])
    Path(reply).write_text(json.dumps({**answer, "processor_time": Meter.clock.how}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
