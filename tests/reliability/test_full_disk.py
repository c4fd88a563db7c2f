"""A disk that is full at any moment costs a sentence, never a dataset."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def may_mount(folder: Path) -> bool:
    """Whether a process may have a small disk of its own here."""
    try:
        tried = subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True)
    except FileNotFoundError:
        return False
    return tried.returncode == 0


def test_a_full_disk(tmp_path):
    if not may_mount(tmp_path):
        pytest.skip("no mount namespaces for users on this machine")
    words = [*NAMESPACE, sys.executable, "-m", "tests.reliability.full_disk", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every full disk was survived" in done.stdout
