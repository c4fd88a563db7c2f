"""RUN/tracking.json: nothing forgotten by a kill, nothing acknowledged twice, one process at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blues.errors import TrackingError
from blues.tracking.outbox import Entries, Outbox, State, read_state


def fresh(server: str = "http://host", **changes) -> State:
    return State(server=server, experiment="blues", run_name="r", **changes)


def reopen(outbox: Outbox, state: State | None = None) -> Outbox:
    outbox.close()
    return Outbox(outbox.path, state or fresh())


def test_what_was_added_survives_until_it_is_acknowledged(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "tracking.json", fresh())
    outbox.add(Entries(params={"a": "1"}, tags={"t": "x"}, artifacts=[["/f", "figures"]], status="FINISHED"))
    outbox = reopen(outbox)
    sent = outbox.snapshot().pending
    assert len(sent) == 4
    outbox.add(Entries(params={"b": "2"}, tags={"t": "y"}))  # while the first is on its way
    outbox.acknowledge(sent, sent_bytes=70)
    outbox = reopen(outbox)
    assert outbox.state.pending == Entries(params={"b": "2"}, tags={"t": "y"})
    assert outbox.state.sent_bytes == 70


def test_a_run_that_the_server_lost_is_sent_whole(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "tracking.json", fresh())
    outbox.begin_run("first")
    outbox.add(Entries(params={"a": "1"}, tags={"t": "x"}))
    outbox.acknowledge(outbox.snapshot().pending, sent_bytes=70)
    outbox.add(Entries(tags={"t": "y"}, status="FAILED"))
    outbox.begin_run("second")
    assert outbox.state.pending == Entries(params={"a": "1"}, tags={"t": "y"}, status="FAILED")
    assert (outbox.state.run_id, outbox.state.sent_bytes) == ("second", 0)


def test_another_server_starts_anew(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "tracking.json", fresh())
    outbox.begin_run("first")
    outbox = reopen(outbox)
    assert outbox.state.run_id == "first"
    outbox = reopen(outbox, fresh("local:/mlflow"))
    assert outbox.state.run_id is None
    outbox.close()


def test_going_back_to_a_checkpoint(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "tracking.json", fresh())
    outbox.rewind(0, size=0, dropped_from=None)
    assert outbox.state.replay_after is None  # there is no run yet that could have later points
    outbox.begin_run("r")
    outbox.add(Entries(status="KILLED"))
    outbox.acknowledge(sent_bytes=100)
    outbox.rewind(50, size=60, dropped_from=60)
    assert (outbox.state.sent_bytes, outbox.state.replay_after, outbox.state.pending.status) == (60, 50, None)
    outbox.rewind(70, size=80, dropped_from=None)
    assert (outbox.state.sent_bytes, outbox.state.replay_after) == (60, 50)
    outbox.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "tracking.json", fresh())
    with pytest.raises(TrackingError, match="another process is recording"):
        Outbox(tmp_path / "tracking.json", fresh())
    outbox.close()
    Outbox(tmp_path / "tracking.json", fresh()).close()


def test_damage_and_later_versions_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tracking.json"
    assert read_state(path) is None
    path.write_text("{")
    with pytest.raises(TrackingError, match="damaged; remove it"):
        read_state(path)
    with pytest.raises(TrackingError, match="damaged"):
        Outbox(path, fresh())
    path.unlink()
    Outbox(path, fresh()).close()
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(TrackingError, match="version 99"):
        read_state(path)
