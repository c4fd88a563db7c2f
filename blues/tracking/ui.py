"""MLflow's pages for a person: `blues ui`.

In: the directory of the local server, or run folders. Out: the unsent rest of those runs in MLflow, and a page that
stays until Ctrl-C.
"""

from __future__ import annotations

import time
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path

from blues.errors import TrackingError
from blues.tracking.destinations import LOCAL
from blues.tracking.mlflow_tracker import send_unsent
from blues.tracking.outbox import read_state
from blues.tracking.server import LocalServer

CHECK_S = 2.0


def serve(
    directory: str | Path,
    *,
    runs: Sequence[str | Path] = (),
    port: int = 0,
    browse: bool = False,
    say: Callable[[str], None] = print,
    stop: Callable[[float], bool] | None = None,
) -> None:
    """Show the local server's pages until Ctrl-C.

    Args:
        directory: of the local server, unless `runs` says where it is; must exist.
        runs: run folders whose unsent metrics are sent first; all of one server.
        port: 0 takes a free one.
        browse: open the page in a web browser.
        say: prints a line.
        stop: waits so many seconds and tells whether to end; until KeyboardInterrupt when None.

    Raises:
        TrackingError: the directory or a run folder is not what it should be, or the server does not start.
    """
    place = _place(directory, runs)
    stop = stop or _sleep
    for run in runs:
        done = send_unsent(run)
        say(f"{run}: {'MLflow has everything' if done else 'MLflow lacks a part, see above'}")
    if not place.startswith(LOCAL):
        say(f"MLflow: {place}")
        return
    with LocalServer(place.removeprefix(LOCAL), port=port) as server:
        shown = ""
        try:
            while True:
                url = server.ensure()
                if url != shown:
                    say(f"MLflow: {url}  (over {server.directory}; Ctrl-C ends it, runs that use it go on)")
                    if port and not url.endswith(f":{port}"):
                        say(f"Its port is not {port}: a run had started it already.")
                    if browse:
                        webbrowser.open(url)
                    shown = url
                if stop(CHECK_S):
                    return
        except KeyboardInterrupt:
            say("")


def _place(directory: str | Path, runs: Sequence[str | Path]) -> str:
    """The one server that is meant, by `Destination.name`."""
    places = {}
    for run in runs:
        state = read_state(Path(run) / "tracking.json")
        if state is None:
            raise TrackingError(
                f"{str(run)!r} has no tracking.json, so it is not a run folder that was recorded in MLflow; give the "
                "folder that `blues train` was given as --run-dir"
            )
        places[state.server] = run
    if len(places) > 1:
        first, second, *_ = places.values()
        raise TrackingError(f"{str(first)!r} and {str(second)!r} are on different MLflow servers; show one at a time")
    if places:
        return next(iter(places))
    if not Path(directory).is_dir():
        raise TrackingError(
            f"there is no MLflow directory {str(directory)!r}; give the one that runs recorded to (--directory, their "
            "tracking.directory), or train first"
        )
    return f"{LOCAL}{Path(directory).resolve()}"


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False
