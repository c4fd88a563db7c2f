"""SIGKILL at random moments, also twice in a row: never a wrong result that can be read, and the end is the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def kill(case: str, folder: Path, kills: int, seed: int = 0) -> None:
    words = [sys.executable, "-m", "tests.reliability.killing", case, str(folder), str(kills), str(seed)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills, " in done.stdout


@pytest.mark.parametrize("case", ["prepare", "update", "merge"])
def test_a_few_kills(tmp_path, case):
    kill(case, tmp_path, 8)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["prepare", "update", "merge", "training"])
def test_fifty_kills(tmp_path, case):
    kill(case, tmp_path, 50, seed=1)
