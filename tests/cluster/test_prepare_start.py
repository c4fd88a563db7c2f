"""When `prepare` starts Ray: beside the planning of a new dataset, and never for what is small or there already."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from blues.cluster import prepare as preparing
from blues.cluster import session
from blues.data.reading import sources
from blues.data.reading.sources import Plan
from tests.data.datasets import TOKENIZER, snapshot


class Started(Exception):
    """Instead of Ray."""


@pytest.fixture
def no_ray(monkeypatch):
    def connect(*_, **__):
        raise Started

    monkeypatch.setattr(session, "connect", connect)


def prepare(source, output: Path, **options) -> preparing.Prepared:
    return preparing.prepare(source, output, TOKENIZER, **options)


def slow_plan(path: Path):
    def look(**_) -> Plan:
        time.sleep(0.2)
        return sources.plan(path)

    return look


@pytest.fixture
def rows(tmp_path) -> Path:
    return write(tmp_path / "rows.csv", 30)


def write(path: Path, rows: int) -> Path:
    path.write_text("text\n" + "".join(f"row {number}\n" for number in range(rows)))
    return path


def test_a_small_dataset_is_made_here_and_what_is_there_or_has_changed_is_looked_through_first(
    no_ray, rows, tmp_path, monkeypatch
):
    made = prepare(lambda: sources.plan(rows), tmp_path / "data")
    assert made.made and made.plan.name == "rows.csv" and made.store.manifest["documents"] == 30
    monkeypatch.setattr(session, "GRACE_S", 0.01)
    assert not prepare(slow_plan(rows), tmp_path / "data").made
    assert not prepare(slow_plan(rows), tmp_path / "data", mode="update", num_workers=1).made
    write(rows, 31)
    assert prepare(slow_plan(rows), tmp_path / "data", mode="update").store.version == 2


@pytest.mark.parametrize("options", [{}, {"mode": "update"}, {"overwrite": True}])
def test_a_new_dataset_starts_ray_while_its_source_is_looked_through(no_ray, rows, tmp_path, monkeypatch, options):
    monkeypatch.setattr(session, "GRACE_S", 0.01)
    if "overwrite" in options:
        prepare(sources.plan(rows), tmp_path / "data")
    with pytest.raises(Started):
        prepare(slow_plan(rows), tmp_path / "data", **options)


@pytest.mark.parametrize("options", [{"num_workers": 1}, {"address": "local"}])
def test_who_names_workers_or_a_cluster_gets_them(no_ray, rows, tmp_path, monkeypatch, options):
    with pytest.raises(Started):
        prepare(sources.plan(rows), tmp_path / "data", **options)
    monkeypatch.setattr(preparing, "HERE_FRESH_BYTES", rows.stat().st_size - 1)
    with pytest.raises(Started):
        prepare(sources.plan(rows), tmp_path / "data")


@pytest.mark.ray
def test_ray_beside_planning_makes_the_same_bytes_and_leaves_no_process(rows, tmp_path, monkeypatch):
    monkeypatch.delenv(session.ADDRESS, raising=False)
    monkeypatch.setattr(session, "GRACE_S", 0.01)
    monkeypatch.setattr(preparing, "code_version", lambda: {"commit": "the same"})
    before, there = set(psutil.Process().children(recursive=True)), set()

    def report(_):
        there.update(set(psutil.Process().children(recursive=True)) - before)

    made = prepare(slow_plan(rows), tmp_path / "data", num_workers=1, report=report)
    assert snapshot(made.store.path) == snapshot(prepare(sources.plan(rows), tmp_path / "here").store.path)
    assert there and not session.is_connected()
    _, alive = psutil.wait_procs(there, timeout=10)
    assert not alive
