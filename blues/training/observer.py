"""What the training loop tells and asks: events out, a wish to stop in.

In: nothing. Out: the `Event`s of a run, in order, from worker 0. A launcher gives the trainer an `Observer` that
carries them to where a person looks; the default one is silent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["start", "train", "validation", "specialization", "checkpoint", "warning", "end"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened after update number `step`.

    metrics: values by name, see `Trainer`. expert_load: share of tokens by mixture layer and expert (kind "train").
    details: plain facts, e.g. the device of a start, the path of a checkpoint or of a report on the experts'
    specialization, whether an end is the last step.
    """

    kind: Kind
    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    expert_load: list[list[float]] | None = None
    details: dict[str, Any] = field(default_factory=dict)


class Observer:
    """Hears every event on worker 0; may ask every worker to stop. This one hears nothing and never stops."""

    def send(self, event: Event) -> None:
        """Take an event. Called between updates: must not block."""

    def flush(self) -> None:
        """Wait until the events so far are kept. Called before a checkpoint replaces the steps behind it."""

    def should_stop(self) -> bool:
        """Whether to save and stop after this update. Called by every worker at every update: must be fast."""
        return False


class Recorder(Observer):
    """Keeps the events in a list, and stops after `stop_after` updates if that is given."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.events: list[Event] = []
        self.stop_after = stop_after
        self._updates = 0

    def send(self, event: Event) -> None:
        self.events.append(event)

    def should_stop(self) -> bool:
        self._updates += 1
        return self.stop_after is not None and self._updates >= self.stop_after

    def metrics(self, name: str) -> dict[int, float]:
        """The values of one metric by step."""
        return {event.step: event.metrics[name] for event in self.events if name in event.metrics}
