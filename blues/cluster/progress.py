"""What a person sees of a run: a heading, one live line, validation lines, the end.

In: training events. Out: text. On a terminal the live line is rewritten in place; elsewhere (a file, a job's log) it
becomes a plain line every `every_s` seconds.
"""

from __future__ import annotations

import math
import sys
import time
from typing import TextIO

from blues.training.observer import Event

CLEAR_LINE = "\r\x1b[2K"
RATE_MEMORY = 0.8
"""How much of the earlier step time the estimate of the time left keeps at each event."""


class Progress:
    """Prints the events of one run."""

    def __init__(self, name: str, steps: int, *, out: TextIO | None = None, every_s: float = 10.0) -> None:
        """steps: in all. out: stdout when None."""
        self.name, self.steps, self.out, self.every_s = name, steps, out or sys.stdout, every_s
        self.interactive = self.out.isatty()
        self._line_shown = False
        self._last_plain = -math.inf
        self._step_seconds: float | None = None
        self._warned: set[str] = set()
        self._starts = 0

    def note(self, text: str) -> None:
        """A line of its own, above the live line."""
        if self._line_shown:
            self.out.write(CLEAR_LINE)
            self._line_shown = False
        self.out.write(f"{text}\n")
        self.out.flush()

    def warn(self, message: str) -> None:
        """A warning, once."""
        if message not in self._warned:
            self._warned.add(message)
            self.note(f"warning: {message}")

    def show(self, event: Event) -> None:
        """Print what an event calls for."""
        match event.kind:
            case "start":
                self._start(event)
            case "train":
                self._live(event)
            case "validation":
                self.note(validation_line(event))
            case "warning":
                self.warn(event.details["message"])

    def _start(self, event: Event) -> None:
        self._starts += 1
        if self._starts > 1:
            self.note(f"the workers were restarted and go on from step {event.step:,}")
            return
        facts = event.details
        active = facts["active_parameters"]
        share = f" ({count(active)} active per token)" if active != facts["parameters"] else ""
        self.note(
            f"{self.name}: {count(facts['parameters'])} parameters{share}, {facts['tokens_per_step']:,} tokens a step, "
            f"{facts['world_size']} x {facts['device']} in {facts['dtype']}, ZeRO {facts['zero_stage']}"
        )
        if event.step:
            self.note(f"going on from step {event.step:,} of {self.steps:,}")

    def _live(self, event: Event) -> None:
        seconds = event.metrics["throughput/step_seconds"]
        before = self._step_seconds
        self._step_seconds = seconds if before is None else RATE_MEMORY * before + (1 - RATE_MEMORY) * seconds
        line = train_line(event, self.steps, (self.steps - event.step) * self._step_seconds)
        if self.interactive:
            self.out.write(CLEAR_LINE + line)
            self.out.flush()
            self._line_shown = True
        elif event.step >= self.steps or time.monotonic() - self._last_plain >= self.every_s:
            self._last_plain = time.monotonic()
            self.note(line)


def train_line(event: Event, steps: int, seconds_left: float) -> str:
    """`step 120/400  loss 3.214  12.3k tokens/s  expert balance 0.23  1m 12s left`."""
    metrics = event.metrics
    parts = [
        f"step {event.step:,}/{steps:,}",
        f"loss {metrics['train/loss']:.3f}",
        f"{count(metrics['throughput/tokens_per_second'])} tokens/s",
    ]
    if "experts/balance" in metrics:
        parts.append(f"fullest expert +{100 * metrics['experts/balance']:.0f}%")
    if event.step < steps:
        parts.append(f"{duration(seconds_left)} left")
    return "  ".join(parts)


def validation_line(event: Event) -> str:
    """`step 120  validation loss 3.050 (perplexity 21.1)  code 2.910  text 3.400`."""
    metrics, prefix = event.metrics, "validation/loss/"
    sources = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    line = f"step {event.step:,}  validation loss {metrics['validation/loss']:.3f}"
    line += f" (perplexity {metrics['validation/perplexity']:,.1f})"
    return line + ("".join(f"  {name} {value:.3f}" for name, value in sources.items()) if len(sources) > 1 else "")


def count(number: float) -> str:
    """`424M`, `12.3k`, `950`."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """`45s`, `3m 05s`, `2h 10m`, `3d 4h`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"
