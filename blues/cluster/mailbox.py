"""Events from worker 0 to the driver, and the wish to stop back: a small Ray actor between them.

In: `Event`s as training produces them. Out: the same, in order, to the driver, which acknowledges what it has kept.
Training never waits for the mailbox, except before a checkpoint (`flush`): the metrics of the steps that a checkpoint
makes final are on the driver's disk first.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from blues.training.observer import Event, Observer

PUSH_S = 0.2
FLUSH_S = 10.0
logger = logging.getLogger(__name__)


class Mailbox:
    """Keeps the events that the driver has not acknowledged, the wish to stop, and the first error of a worker."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._acknowledged = 0
        self._stop = False
        self._failure: tuple[str, str] | None = None

    def put(self, events: list[Event]) -> tuple[int, bool]:
        """From worker 0: take `events`; returns how many the driver has not kept yet, and whether to stop."""
        self._events += events
        return len(self._events), self._stop

    def take(self, acknowledged: int) -> tuple[list[Event], tuple[str, str] | None]:
        """From the driver, which has kept `acknowledged` events in all: those after them, and a failure if any."""
        del self._events[: acknowledged - self._acknowledged]
        self._acknowledged = acknowledged
        return self._events, self._failure

    def request_stop(self) -> None:
        """From the driver: save and stop."""
        self._stop = True

    def fail(self, kind: str, message: str) -> None:
        """From any worker: a `BluesError` named `kind`, which another attempt would meet again."""
        self._failure = self._failure or (kind, message)


def open_mailbox() -> Any:
    """A handle to a new mailbox actor; it takes no CPU and ends with the process that opened it.

    It lives on this process's machine: elsewhere, a spot node that is taken away would take the run's events along.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=here).remote()


class MailboxObserver(Observer):
    """Worker 0's end. A thread carries events and brings back the wish to stop."""

    def __init__(self, put: Callable[[list[Event]], tuple[int, bool]]) -> None:
        """`put` delivers events and returns what `Mailbox.put` does."""
        self._put = put
        self._lock = threading.Lock()
        self._queue: list[Event] = []
        self._pending = 0
        self._stop = False
        self._closed = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True, name="mailbox")
        self._thread.start()

    def send(self, event: Event) -> None:
        with self._lock:
            self._queue.append(event)
            self._pending += 1
        self._wake.set()

    def should_stop(self) -> bool:
        return self._stop

    def flush(self) -> None:
        """Wait (a bounded time: a slow driver must not stop training) until the driver has kept every event."""
        give_up = time.monotonic() + FLUSH_S
        while self._pending and self._thread.is_alive():
            if time.monotonic() > give_up:
                logger.warning("the driver has not kept the metrics of the last steps for %s s", FLUSH_S)
                return
            self._wake.set()
            time.sleep(PUSH_S / 10)

    def close(self) -> None:
        """Deliver what is left and end the thread."""
        self._closed.set()
        self._wake.set()
        self._thread.join(FLUSH_S)

    def _carry(self) -> None:
        try:
            while not self._closed.is_set() or self._queue:
                self._wake.wait(PUSH_S)
                self._wake.clear()
                with self._lock:
                    events, self._queue = self._queue, []
                kept_later, self._stop = self._put(events)
                with self._lock:
                    self._pending = kept_later + len(self._queue)
        except ray.exceptions.RayError as error:
            logger.warning("the driver's mailbox is gone (%s); training goes on unobserved", error)
