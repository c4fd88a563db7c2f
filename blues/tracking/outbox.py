"""RUN/tracking.json: what of a run has reached its MLflow server, and what still has to.

In: parameters, tags, files and the end of a run; acknowledgements of the server. Out: the same after a kill: the file
is replaced atomically at every change, so that nothing is forgotten and nothing acknowledged is sent again.

Metrics are not kept here: they stand in RUN/metrics.jsonl, and `sent_bytes` says how much of that file has arrived.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from blues.config import write_atomic
from blues.errors import TrackingError

VERSION = 1
Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass
class Entries:
    """What a run records apart from metrics."""

    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: list[list[str]] = field(default_factory=list)
    """[absolute path, folder] pairs."""
    status: str | None = None

    def __len__(self) -> int:
        return len(self.params) + len(self.tags) + len(self.artifacts) + (self.status is not None)

    def add(self, other: Entries) -> None:
        """Take over `other`, whose values are the later ones."""
        self.params |= other.params
        self.tags |= other.tags
        self.artifacts += [pair for pair in other.artifacts if pair not in self.artifacts]
        self.status = other.status or self.status

    def remove(self, other: Entries) -> None:
        """Take out what equals `other`'s; what was changed meanwhile stays."""
        for mine, theirs in ((self.params, other.params), (self.tags, other.tags)):
            for name, value in theirs.items():
                if mine.get(name) == value:
                    del mine[name]
        self.artifacts = [pair for pair in self.artifacts if pair not in other.artifacts]
        if self.status == other.status:
            self.status = None


@dataclass
class State:
    """The contents of the file."""

    server: str
    """Where the run is: an MLflow URI without credentials, or `local:DIRECTORY` for the local server."""
    experiment: str
    run_name: str
    parent_run_id: str | None = None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Names the run before the server has given it an id: a run whose creation was not acknowledged is found by it."""
    run_id: str | None = None
    sent_bytes: int = 0
    """The server has the lines of metrics.jsonl up to here."""
    replay_after: int | None = None
    """The server may already have points of later steps, from before the run went back to a checkpoint."""
    pending: Entries = field(default_factory=Entries)
    """Not acknowledged yet."""
    recorded: Entries = field(default_factory=Entries)
    """Acknowledged; sent again if the server loses the run."""


class Outbox:
    """`State` that is on the disk whenever a method returns. Safe for the run's thread and the sending thread.

    Args:
        path: RUN/tracking.json.
        fresh: the state of a run that has none yet. A file that tells of another server is replaced by it: there, the
            run has to be made and sent anew.

    Raises:
        TrackingError: another process is sending this run, or the file is damaged.
    """

    def __init__(self, path: str | Path, fresh: State) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self._owner: int | None = os.open(self.path.parent, os.O_RDONLY)  # the folder itself is locked, until close
        try:
            fcntl.flock(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._owner)
            raise TrackingError(
                f"another process is recording {str(self.path.parent)!r}; wait for it to end, or use another run folder"
            ) from None
        try:
            stored = read_state(self.path)
        except TrackingError:
            os.close(self._owner)
            raise
        self.state = stored if stored is not None and stored.server == fresh.server else fresh
        self._save()

    def rewind(self, step: int | None, size: int, dropped_from: int | None) -> None:
        """The metrics file was opened again at a size, perhaps cut at a byte to go back to a step."""
        with self._lock:
            self.state.sent_bytes = min(self.state.sent_bytes, size if dropped_from is None else dropped_from)
            if step is not None and self.state.run_id is not None:
                earlier = self.state.replay_after
                self.state.replay_after = step if earlier is None else min(step, earlier)
            self.state.pending.status = self.state.recorded.status = None  # how it ended before no longer holds
            self._save()

    def add(self, entries: Entries) -> None:
        """Something to send."""
        with self._lock:
            self.state.pending.add(entries)
            self._save()

    def snapshot(self) -> State:
        """A copy to work from while the run goes on adding."""
        with self._lock:
            return _from_json(asdict(self.state))

    def begin_run(self, run_id: str) -> None:
        """The server made a new run: everything is yet to be sent."""
        with self._lock:
            state = self.state
            state.run_id, state.sent_bytes, state.replay_after = run_id, 0, None
            state.recorded.add(state.pending)
            state.pending, state.recorded = state.recorded, Entries()
            self._save()

    def acknowledge(self, sent: Entries | None = None, *, sent_bytes: int | None = None) -> None:
        """The server has these. What was added or changed meanwhile stays pending."""
        with self._lock:
            if sent is not None:
                self.state.pending.remove(sent)
                self.state.recorded.add(sent)
            if sent_bytes is not None:
                self.state.sent_bytes = sent_bytes
            self._save()

    def close(self) -> None:
        """Another process may send the run from now on."""
        with self._lock:
            if self._owner is not None:
                os.close(self._owner)
                self._owner = None

    def _save(self) -> None:
        tree = {"version": VERSION, **asdict(self.state)}
        write_atomic(self.path, json.dumps(tree, indent=1).encode())


def read_state(path: str | Path) -> State | None:
    """The state in RUN/tracking.json; None when there is no such file.

    Raises:
        TrackingError: the file is damaged or of a later version of Blues.
    """
    try:
        tree: dict[str, Any] = json.loads(Path(path).read_text())
        version = tree.pop("version")
        if version == VERSION:
            return _from_json(tree)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TrackingError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise TrackingError(f"{str(path)!r} is damaged; remove it to record the run anew in MLflow") from None
    raise TrackingError(f"{str(path)!r} has version {version} where this Blues writes {VERSION}; use a later Blues")


def _from_json(tree: dict[str, Any]) -> State:
    entries = {name: Entries(**tree[name]) for name in ("pending", "recorded")}
    return State(**{**tree, **entries})
