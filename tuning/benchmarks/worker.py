"""The process in which one measurement is made: `python -P worker.py REQUEST REPLY`.

In: a JSON file that names a function of a Python file and its arguments. Out: a JSON file with the figures that the
function returned. It knows the standard library alone, and loads the function by its file's path: a peer is measured
in an environment of its own where Blues is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

STATUS, FORGET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
KIB, MB = 1 << 10, 1e6


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


class Meter:
    """Measures a `with` block: `seconds` of wall time, `cpu_s` of processor time, growth of memory in MB.

    `cpu_s` counts all threads, and the processes that were started and waited for. `growth_mb` is the highest point in
    the block less the start; `files_mb` the part of the growth that is pages of files, which the kernel takes back when
    it needs them.
    """

    seconds = cpu_s = growth_mb = files_mb = 0.0

    def __enter__(self) -> Meter:
        FORGET_PEAK.write_text("5")  # proc(5): the peak starts over from what is resident now
        self._memory = Memory.read()
        self._cpu, self._wall = processor_s(), time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.seconds, self.cpu_s = time.perf_counter() - self._wall, processor_s() - self._cpu
        now = Memory.read()
        self.growth_mb = max(0, now.peak - self._memory.resident) / MB
        self.files_mb = max(0, now.files - self._memory.files) / MB

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
            first, cpu = time.perf_counter(), processor_s()
            for _ in range(batches):
                read()
            seconds, cpu_s = time.perf_counter() - first, processor_s() - cpu
        return {
            "MB/s": batches * batch_bytes / MB / seconds,
            "MB/s a core": batches * batch_bytes / MB / cpu_s,
            "open ms": 1e3 * (opened - began),
            "first batch ms": 1e3 * (first - began),
            "growth MB": spent.growth_mb,
            "of it files MB": spent.files_mb,
        }


def processor_s() -> float:
    """Processor time of this process and of those it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def load_function(file: str, name: str) -> Callable[..., dict[str, Any]]:
    """The function `name` of the Python file."""
    spec = importlib.util.spec_from_file_location(f"measured_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None, f"{file} is no Python file"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return getattr(module, name)


def main(request: str, reply: str) -> None:
    """Call what the request names, with `Meter` as the first argument, and write what it returns."""
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    answer = load_function(asked["file"], asked["function"])(Meter, **asked["arguments"])
    Path(reply).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
