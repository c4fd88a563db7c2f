"""Tasks on a pool of Ray Data actors, or here: all of them once, each result as soon as it is there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from blues.cluster import pool, session

OBJECT_STORE = 200 * 2**20
BLOCK = 5


@pytest.fixture(scope="module")
def ray_session():
    with session.connect("local", num_cpus=2, object_store_memory=OBJECT_STORE) as connected:
        yield connected


def doubler() -> Callable[[int, int], int]:
    return lambda number, task: 2 * task


def slow_at_first(folder: Path) -> Callable[[int, None], int]:
    """Tells in the folder which tasks were begun; the first ones take a second each."""

    def work(number: int, task: None) -> int:
        (folder / str(number)).touch()
        time.sleep(1.0 if number < BLOCK - 1 else 0)
        return number

    return work


@pytest.mark.ray
@pytest.mark.parametrize("tasks", [1, 40])
def test_here_and_with_ray_each_task_is_done_once(ray_session, tasks, monkeypatch):
    monkeypatch.setattr(pool, "MOST_BLOCKS", 1)
    given = {number + 3: number for number in range(tasks)}
    expected = {number: 2 * task for number, task in given.items()}
    for here in (True, False):
        found = list(pool.map_tasks(doubler, (), given, here=here))
        assert len(found) == tasks and dict(found) == expected


@pytest.mark.ray
def test_a_result_is_handed_on_before_its_block_is_done(ray_session, tmp_path, monkeypatch):
    import ray.data

    monkeypatch.setattr(pool, "MOST_BLOCKS", 1)
    before = ray.data.DataContext.get_current().target_max_block_size
    tasks = dict.fromkeys(range(16 * BLOCK))  # 16 blocks for one worker
    results = pool.map_tasks(slow_at_first, (tmp_path,), tasks, num_workers=1)
    assert next(results) == (0, 0) and not (tmp_path / str(BLOCK - 1)).exists()
    assert sorted(results) == [(number, number) for number in range(1, len(tasks))]
    assert ray.data.DataContext.get_current().target_max_block_size == before, "the caller's settings are its own"
