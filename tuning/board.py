"""What a person sees of a sweep: one row for each trial.

In: reports of trials. Out: on a terminal a table that is redrawn in place; elsewhere (a file, a job's log) a plain
line whenever a trial starts, is validated, or ends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO

Status = Literal["waiting", "running", "done", "failed"]
REDRAW_SECONDS = 0.5


@dataclass
class Row:
    """How one trial stands."""

    name: str
    steps: int
    status: Status = "waiting"
    step: int = 0
    loss: float | None = None
    validation: float | None = None
    speed: float | None = None
    balance: float | None = None

    def text(self, width: int) -> str:
        cells = [
            f"{self.name:<{width}}",
            f"{self.status:<7}",
            f"{self.step:>6,}/{self.steps:<6,}",
            "loss " + _number(self.loss, "7.4f"),
            "validation " + _number(self.validation, "7.4f"),
            _number(self.speed, "9,.0f") + " tokens/s",
            "fullest expert " + _number(self.balance, "+5.0%"),
        ]
        return "  ".join(cells)


class Board:
    """The rows of a sweep, by trial name."""

    def __init__(self, steps: Mapping[str, int], *, out: TextIO | None = None) -> None:
        self.rows = {name: Row(name, count) for name, count in steps.items()}
        self.out = out or sys.stdout
        self.interactive = self.out.isatty()
        self._width = max((len(name) for name in steps), default=0)
        self._drawn = 0
        self._last = 0.0

    def report(self, name: str, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """A trial said something: the kind of a training event, its step and metrics."""
        row = self.rows[name]
        started = row.status != "running"
        row.status, row.step = "running", step
        row.loss = metrics.get("train/cross_entropy", metrics.get("train/loss", row.loss))
        row.validation = metrics.get("validation/loss", row.validation)
        row.speed = metrics.get("throughput/tokens_per_second", row.speed)
        row.balance = metrics.get("experts/balance", row.balance)
        self._show(row, now=started or kind == "validation")

    def finish(self, name: str, status: Status, **facts: Any) -> None:
        """A trial ended, or was found finished; `facts` are fields of its row."""
        row = self.rows[name]
        row.status = status
        for field, value in facts.items():
            setattr(row, field, value)
        self._show(row, now=True)

    def note(self, lines: Sequence[str]) -> None:
        """Plain lines below what stands; a table is drawn anew under them."""
        print(*lines, sep="\n", file=self.out, flush=True)
        self._drawn = 0

    def _show(self, row: Row, *, now: bool) -> None:
        if not self.interactive:
            if now:
                print(row.text(self._width), file=self.out, flush=True)
            return
        if not now and time.monotonic() - self._last < REDRAW_SECONDS:
            return
        self._last = time.monotonic()
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        self.out.write(up + "".join(f"\x1b[2K{each.text(self._width)}\n" for each in self.rows.values()))
        self.out.flush()
        self._drawn = len(self.rows)


def _number(value: float | None, form: str) -> str:
    return "-".rjust(int(form.partition(".")[0].strip("+,"))) if value is None else f"{value:{form}}"
