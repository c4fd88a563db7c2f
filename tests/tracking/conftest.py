"""One local MLflow server for all tests of tracking; none of them sees the person's own MLflow settings."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from blues.tracking.server import LocalServer


@pytest.fixture(autouse=True)
def no_mlflow_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("MLFLOW_TRACKING_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with LocalServer(tmp_path_factory.mktemp("mlflow")) as running:
        yield running
