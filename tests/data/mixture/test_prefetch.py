"""Reading ahead gives what reading directly gives, holds no more than it may, and stops when it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as hyp

from blues.data.mixture.prefetch import THREAD_NAME, read_ahead


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


def eventually(condition) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


@settings(max_examples=30, deadline=None)
@given(items=hyp.lists(hyp.integers(), max_size=40), limit=hyp.integers(0, 50))
def test_the_results_are_those_of_reading_directly_for_any_limit(items, limit):
    assert list(read_ahead(lambda item: item * 3, items, limit)) == [item * 3 for item in items]
    assert not reading_threads()


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_no_more_results_wait_than_the_limit(limit):
    read: list[int] = []
    ahead = read_ahead(lambda item: read.append(item) or item, range(1 << 40), limit)
    for taken in range(1, 6):
        next(ahead)
        assert eventually(lambda: len(read) == taken + limit)  # noqa: B023
        time.sleep(0.005)
        assert len(read) == taken + limit, "one in use, the others ready"
    ahead.close()
    assert not reading_threads()


def test_without_a_limit_nothing_is_read_before_it_is_asked_for():
    read: list[int] = []
    direct = read_ahead(lambda item: read.append(item) or item, range(1 << 40), 0)
    for taken in range(1, 6):
        next(direct)
        assert len(read) == taken and not reading_threads()
    direct.close()


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_an_error_comes_in_its_place(limit):
    def read(item: int) -> int:
        if item == 2:
            raise OSError("the disk went away")
        return item

    ahead = read_ahead(read, [0, 1, 2, 3], limit)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(OSError, match="the disk went away"):
        next(ahead)
    assert not reading_threads()

    def items() -> Iterator[int]:
        yield 0
        raise ValueError("no plan")

    ahead = read_ahead(read, items(), limit)
    assert next(ahead) == 0
    with pytest.raises(ValueError, match="no plan"):
        next(ahead)
    assert not reading_threads()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, GeneratorExit, ValueError])
def test_an_interruption_ends_the_thread_at_once(interruption):
    ahead = read_ahead(lambda item: item, range(1 << 40), 4)
    next(ahead)
    assert len(reading_threads()) == 1
    began = time.monotonic()
    with pytest.raises(interruption):
        ahead.throw(interruption)
    assert not reading_threads() and time.monotonic() - began < 1


def test_what_is_being_read_when_it_is_closed_is_the_last():
    reading, go_on, read = threading.Event(), threading.Event(), []

    def slow(item: int) -> int:
        read.append(item)
        if item == 1:
            reading.set()
            go_on.wait(5)
        return item

    ahead = read_ahead(slow, range(1 << 40), 3)
    next(ahead)
    assert reading.wait(5)
    threading.Timer(0.05, go_on.set).start()
    ahead.close()
    assert read == [0, 1] and not reading_threads()
