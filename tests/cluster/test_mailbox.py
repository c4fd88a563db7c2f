"""Events in order, acknowledged, and the wish to stop; without Ray, on the actor's own class."""

import threading
import time

import pytest

from blues.cluster import mailbox as mb
from blues.training.observer import Event


@pytest.fixture
def pair():
    box = mb.Mailbox()
    observer = mb.MailboxObserver(box.put)
    yield box, observer
    observer.close()


def events(*steps):
    return [Event(kind="train", step=step) for step in steps]


def test_the_driver_gets_every_event_once_and_in_order(pair):
    box, observer = pair
    for event in events(*range(50)):
        observer.send(event)
    kept: list[int] = []
    while len(kept) < 50:
        kept += [event.step for event in box.take(len(kept))[0]]
        time.sleep(0.01)
    assert kept == list(range(50)) and box.take(50) == ([], None)


def test_flush_waits_until_the_driver_has_kept_all(pair):
    box, observer = pair
    observer.send(events(1)[0])
    returned = threading.Event()
    thread = threading.Thread(target=lambda: (observer.flush(), returned.set()))
    thread.start()
    time.sleep(0.3)
    assert not returned.is_set()
    assert len(box.take(0)[0]) == 1
    assert not returned.wait(0.3)  # taken is not yet kept
    box.take(1)
    assert returned.wait(2)
    thread.join()


def test_flush_does_not_wait_for_ever(pair, monkeypatch):
    _, observer = pair
    monkeypatch.setattr(mb, "FLUSH_S", 0.2)
    observer.send(events(1)[0])
    began = time.monotonic()
    observer.flush()
    assert time.monotonic() - began < 2


def test_the_wish_to_stop_reaches_the_worker(pair):
    box, observer = pair
    assert not observer.should_stop()
    box.request_stop()
    give_up = time.monotonic() + 5
    while not observer.should_stop() and time.monotonic() < give_up:
        time.sleep(0.01)
    assert observer.should_stop()


def test_a_second_attempt_of_the_workers_goes_on_in_the_same_mailbox(pair):
    box, observer = pair
    observer.send(events(1)[0])
    observer.close()
    second = mb.MailboxObserver(box.put)
    second.send(events(2)[0])
    second.close()
    assert [event.step for event in box.take(0)[0]] == [1, 2]


def test_the_first_failure_is_the_one_told():
    box = mb.Mailbox()
    box.fail("CheckpointError", "first")
    box.fail("DataError", "second")
    assert box.take(0)[1] == ("CheckpointError", "first")
