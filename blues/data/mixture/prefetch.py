"""Reading ahead in a thread.

In: a function and what to call it with, one after the other. Out: the same results in the same order, some of them
ready before they are asked for. How far ahead changes nothing but the time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from queue import SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
THREAD_NAME = "blues-read-ahead"


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item], limit: int) -> Generator[Result, None, None]:
    """`read(item)` for each of `items`, with at most `limit` results waiting, the one being read included.

    With a limit of 0 there is no thread and `read` is called when its result is asked for. An error of `read`, or of
    `items`, is raised in the place of the result it belongs to. Closing the generator ends the thread: what it is
    reading is the last it reads.
    """
    if limit == 0:
        yield from map(read, items)
        return
    reader = _Reader(read, items, limit)
    reader.thread.start()
    try:
        while (outcome := reader.outcomes.get()) is not None:
            reader.slots.release()
            if isinstance(outcome, _Failure):
                raise outcome.error
            yield outcome.result
    finally:
        reader.stop()


class _Success(Generic[Result]):
    def __init__(self, result: Result) -> None:
        self.result = result


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Reader(Generic[Item, Result]):
    """The thread, a slot for every result that may wait, and the results; None after the last."""

    def __init__(self, read: Callable[[Item], Result], items: Iterable[Item], limit: int) -> None:
        self.read, self.items = read, items
        self.slots = threading.Semaphore(limit)
        self.outcomes: SimpleQueue[_Success[Result] | _Failure | None] = SimpleQueue()
        self.stopped = False
        self.thread = threading.Thread(target=self._run, daemon=True, name=THREAD_NAME)

    def stop(self) -> None:
        """Wait for the end of the read under way, and for no other."""
        self.stopped = True
        self.slots.release()  # it may be waiting for one
        self.thread.join()

    def _run(self) -> None:
        try:
            for item in self.items:
                self.slots.acquire()
                if self.stopped:
                    return
                self.outcomes.put(_Success(self.read(item)))
            self.outcomes.put(None)
        except BaseException as error:  # handed to the one who asks, who raises it
            self.outcomes.put(_Failure(error))
