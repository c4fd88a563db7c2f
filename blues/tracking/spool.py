"""RUN/metrics.jsonl: every metric of a run, on the disk before training goes on.

In: metrics by step. Out: one JSON line per call, `{"step": 10, "time": 1700000000.123, "metrics": {"train/loss": 3.2}}`
(time in seconds since 1970; NaN and infinities as the strings "NaN", "Infinity", "-Infinity").

The file is append-only and each line is flushed to the disk. What a kill can leave is one torn last line; opening the
file again cuts it off. Each (metric, step) stands once.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from blues.config import write_atomic
from blues.errors import TrackingError


@dataclass(frozen=True)
class Line:
    """One line of the file. `end` is the byte offset just after it."""

    step: int
    time: float
    metrics: dict[str, float]
    end: int


class MetricsFile:
    """The file opened for appending.

    Args:
        path: made with its folder when absent; a torn last line is cut off.
        keep_until: drop the lines of later steps: training goes on from this step and will write them again.

    Raises:
        TrackingError: the file cannot be written, or a line that is not the last is damaged.
    """

    def __init__(self, path: str | Path, *, keep_until: int | None = None) -> None:
        self.path = Path(path)
        self.dropped_from: int | None = None
        """Where the first dropped line began, in bytes; None when none was dropped."""
        self._seen: dict[int, frozenset[str]] = {}
        self._names: dict[frozenset[str], frozenset[str]] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._repair(keep_until)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise TrackingError(f"cannot write metrics to {str(self.path)!r}: {error.strerror}") from None

    def append(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one line and wait for the disk. Metrics that this step already has are left as they are."""
        seen = self._seen.get(step, frozenset())
        fresh = {name: float(value) for name, value in metrics.items() if name not in seen}
        if not fresh:
            return
        values = {name: value if math.isfinite(value) else _spell(value) for name, value in fresh.items()}
        line = json.dumps({"step": int(step), "time": round(time.time(), 3), "metrics": values}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        os.fsync(self._file.fileno())
        self._remember(step, seen.union(fresh))

    def close(self) -> None:
        """Further appends fail."""
        self._file.close()

    def _repair(self, keep_until: int | None) -> None:
        """Cut a torn last line, drop steps after `keep_until`, and note what stands."""
        if not self.path.exists():
            return
        raw = self.path.read_bytes()
        kept, end = [], 0
        for line in _parse(raw, 0, self.path):
            if keep_until is None or line.step <= keep_until:
                kept.append(raw[end : line.end])
                self._remember(line.step, self._seen.get(line.step, frozenset()).union(line.metrics))
            elif self.dropped_from is None:
                self.dropped_from = end
            end = line.end
        text = b"".join(kept)
        if text != raw:
            write_atomic(self.path, text)

    def _remember(self, step: int, names: frozenset[str]) -> None:
        # most steps have the same few sets of names: share them
        self._seen[step] = self._names.setdefault(names, names)


def read_lines(path: str | Path, offset: int = 0) -> Iterator[Line]:
    """The whole lines of a metrics file from a byte offset on; an unfinished last line is left out.

    Raises:
        TrackingError: the file cannot be read, or holds a damaged line (named by number).
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            raw = file.read()
    except OSError as error:
        raise TrackingError(f"cannot read metrics from {str(path)!r}: {error.strerror}") from None
    yield from _parse(raw, offset, path)


def read_history(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Every metric of a metrics file as (step, value) pairs in order of steps."""
    history: dict[str, dict[int, float]] = {}
    for line in read_lines(path):
        for name, value in line.metrics.items():
            history.setdefault(name, {}).setdefault(line.step, value)
    return {name: sorted(points.items()) for name, points in history.items()}


def _parse(raw: bytes, offset: int, path: Path) -> Iterator[Line]:
    end = offset
    lines = raw.split(b"\n")[:-1]  # what follows the last newline is a line that was not finished
    for number, text in enumerate(lines):
        end += len(text) + 1
        try:
            entry = json.loads(text)
            metrics = {name: float(value) for name, value in entry["metrics"].items()}
            yield Line(step=int(entry["step"]), time=float(entry["time"]), metrics=metrics, end=end)
        except (ValueError, KeyError, TypeError, AttributeError):
            if number == len(lines) - 1:  # a kill within the write of a page can leave garbage before a newline
                return
            where = f"line {number + 1}" if offset == 0 else f"byte {end - len(text) - 1}"
            raise TrackingError(
                f"{where} of {str(path)!r} is damaged; remove that line, or start the run anew with --fresh"
            ) from None


def _spell(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"
