"""RUN/metrics.jsonl: durable, repaired after a kill, each (metric, step) once."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blues.errors import TrackingError
from blues.tracking.spool import MetricsFile, read_history, read_lines


def write(path: Path, steps: range | list[int], scale: float = 1.0, keep_until: int | None = None) -> MetricsFile:
    file = MetricsFile(path, keep_until=keep_until)
    for step in steps:
        file.append({"train/loss": scale * step}, step)
    file.close()
    return file


def test_lines_have_the_documented_form(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path)
    file.append({"train/loss": 3.25, "experts/balance": 0.5}, 10)
    entry = json.loads(path.read_text())  # on the disk before close
    assert entry["step"] == 10
    assert entry["metrics"] == {"train/loss": 3.25, "experts/balance": 0.5}
    assert entry["time"] == pytest.approx(path.stat().st_mtime, abs=2)
    file.close()


def test_values_that_are_not_finite_are_legal_json_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.append({"a": math.nan, "b": math.inf, "c": -math.inf}, 1)
    file.close()
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (line,) = read_lines(path)
    assert math.isnan(line.metrics["a"])
    assert (line.metrics["b"], line.metrics["c"]) == (math.inf, -math.inf)


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 400))
def test_a_file_cut_anywhere_is_repaired(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    write(path, range(1, 7))
    raw = path.read_bytes()
    path.write_bytes(raw[: min(cut, len(raw))])
    whole = raw[: min(cut, len(raw))].count(b"\n")
    assert len(list(read_lines(path))) == whole  # a reader tolerates the torn line
    write(path, range(1, 7))
    assert read_history(path) == {"train/loss": [(step, float(step)) for step in range(1, 7)]}
    assert len(path.read_bytes().splitlines()) == 6


def test_a_torn_line_of_garbage_is_cut_and_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    with open(path, "ab") as file:
        file.write(b"\0\0\0\n")
    write(path, [4])
    assert [step for step, _ in read_history(path)["train/loss"]] == [1, 2, 3, 4]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"step": 2, "tim\n' + b"".join(lines[2:]))
    for use in (lambda: MetricsFile(path), lambda: read_history(path)):
        with pytest.raises(TrackingError, match=r"line 2 of .*metrics\.jsonl.*--fresh"):
            use()


def test_each_metric_of_a_step_stands_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.append({"train/loss": 1.0}, 5)
    file.append({"train/loss": 2.0, "validation/loss": 3.0}, 5)
    file.append({"train/loss": 4.0}, 5)
    file.close()
    again = MetricsFile(path)
    again.append({"validation/loss": 9.0}, 5)
    again.close()
    assert [line.metrics for line in read_lines(path)] == [{"train/loss": 1.0}, {"validation/loss": 3.0}]


def test_going_back_to_a_checkpoint_drops_what_is_trained_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 9))
    end_of_five = list(read_lines(path))[4].end
    file = write(path, range(6, 11), scale=10.0, keep_until=5)
    assert file.dropped_from == end_of_five
    history = read_history(path)["train/loss"]
    assert history == [(step, float(step if step <= 5 else 10 * step)) for step in range(1, 11)]
    assert MetricsFile(path, keep_until=10).dropped_from is None


def test_reading_from_an_offset(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 5))
    lines = list(read_lines(path))
    assert [line.step for line in read_lines(path, lines[1].end)] == [3, 4]
    assert lines[-1].end == path.stat().st_size
    with pytest.raises(TrackingError, match="cannot read"):
        list(read_lines(tmp_path / "absent.jsonl"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="cannot write metrics"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl")


def test_what_was_logged_survives_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    program = (
        "import sys; from blues.tracking.spool import MetricsFile\n"
        "file = MetricsFile(sys.argv[1]); step = 0\n"
        "while True:\n"
        "    step += 1; file.append({'a': step}, step); print(step, flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    seen = [int(writer.stdout.readline()) for _ in range(50)]
    os.kill(writer.pid, signal.SIGKILL)
    seen += [int(line) for line in writer.stdout.read().split()]
    writer.wait()
    MetricsFile(path).close()
    steps = [step for step, _ in read_history(path)["a"]]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= seen[-1]
