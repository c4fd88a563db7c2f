"""Which MLflow server a run goes to: the local one of a directory, or one that the person named.

In: `Tracking.Config` and the environment, or the name in RUN/tracking.json. Out: a `Destination` that gives a URI each
time the sending thread connects.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from blues.errors import TrackingError
from blues.tracking.mlflow_run import client
from blues.tracking.redaction import redact
from blues.tracking.server import LocalServer

LOCAL = "local:"


class Destination(Protocol):
    """An MLflow server, there or not."""

    @property
    def name(self) -> str:
        """What identifies it across restarts: the URI without credentials, or `local:DIRECTORY`."""

    def connect(self) -> str:
        """The tracking URI to use from now on. Raises when the server is not there."""

    def close(self) -> None:
        """This process needs the server no more."""


class LocalDestination:
    """The local server over a directory; `connect` starts it, and starts it again when it has died."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).resolve()
        self.name = f"{LOCAL}{self.directory}"
        self._server: LocalServer | None = None

    def connect(self) -> str:
        if self._server is None:
            self._server = LocalServer(self.directory)
            return self._server.url
        return self._server.ensure()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


class RemoteDestination:
    """A server (or any MLflow tracking URI) that the person asked for."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self.name = redact(uri)

    def connect(self) -> str:
        return self._uri

    def close(self) -> None:
        """Nothing is held."""

    def check(self) -> None:
        """Ask the server something.

        Raises:
            TrackingError: it does not answer, or refuses the credentials.
        """
        try:
            client(self._uri).search_experiments(max_results=1)
        except Exception as error:  # MLflow, its plugins and their clients raise what they like
            reason = redact(" ".join(str(error).split()))[:300]
            raise TrackingError(
                f"the MLflow server {self.name} cannot be used ({reason}); check tracking.uri (or MLFLOW_TRACKING_URI) "
                "and the MLFLOW_TRACKING_* credentials, or set tracking.uri=null for the local server, or "
                "tracking.enabled=false to train without MLflow"
            ) from None


def choose(uri: str | None, directory: str | Path) -> Destination:
    """`uri`, or else MLFLOW_TRACKING_URI, or else the local server over `directory`.

    Raises:
        TrackingError: the URI that the person named cannot be used.
    """
    asked = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not asked:
        return LocalDestination(directory)
    remote = RemoteDestination(asked)
    remote.check()
    return remote


def named(name: str) -> Destination:
    """The destination of that `Destination.name`; credentials come from the environment."""
    if name.startswith(LOCAL):
        return LocalDestination(name.removeprefix(LOCAL))
    environment = os.environ.get("MLFLOW_TRACKING_URI", "")
    return RemoteDestination(environment if redact(environment) == name else name)
