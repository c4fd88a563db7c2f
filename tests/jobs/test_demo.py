"""The demonstration: its stages are real commands, it stops at the first failure, goes on later, and does not boast."""

from __future__ import annotations

import pytest

from blues import cli
from blues.errors import BluesError
from blues.evaluation.unigram import unigram_entropy
from blues.tracking.spool import MetricsFile
from jobs.demo import Demo, Stage, collect, conclude, stages
from tests.training.tiny import make_dataset


def test_every_stage_is_a_command_that_the_command_line_accepts(tmp_path):
    commands = [stage.command for stage in stages(tmp_path) if stage.command]
    for command in commands:
        assert cli.job_parser(command[0]).parse(command[1:])
    assert [command[0] for command in commands] == [
        "prepare",
        "prepare",
        "verify",
        "merge",
        "train",
        "sweep",
        "generate",
        "generate",
    ]


def test_stages_run_in_order_are_timed_and_told(capsys):
    done = []
    demo = Demo([Stage("One", function=lambda: done.append(1)), Stage("Two", function=lambda: done.append(2))])
    assert demo.run() == 0
    assert done == [1, 2] and list(demo.seconds) == ["One", "Two"]
    assert "[1/2] One" in capsys.readouterr().out


def test_a_stage_of_an_earlier_run_is_not_done_again(capsys):
    demo = Demo([Stage("One", function=pytest.fail, done=lambda: True)])
    assert demo.run() == 0
    assert "done by an earlier run" in capsys.readouterr().out and demo.seconds == {}


def test_a_failing_command_stops_the_demo_with_its_status(tmp_path, capsys):
    demo = Demo(
        [Stage("Broken", ("generate", "--checkpoint", str(tmp_path / "none"), "--prompt", "x")), Stage("Never")]
    )
    assert demo.run() == 2
    out, err = capsys.readouterr()
    assert "$ blues generate --checkpoint" in out and "none" in err and "stopped at stage 1" in err
    assert "Never" not in out


def test_the_collected_data_is_code_and_text(tmp_path, capsys):
    collect(tmp_path)
    assert (tmp_path / "text.jsonl").stat().st_size > 500_000
    assert sum(file.stat().st_size for file in (tmp_path / "code").rglob("*.py")) > 1_000_000


@pytest.mark.parametrize(("margin", "status"), [(-0.5, 0), (+0.5, 1)])
def test_it_fails_honestly_if_nothing_was_learned(tmp_path, capsys, margin, status):
    make_dataset(tmp_path / "data").rename(tmp_path / "data" / "mix")
    entropy = unigram_entropy(tmp_path / "data" / "mix").own
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    file = MetricsFile(tmp_path / "runs" / "tiny" / "metrics.jsonl")
    file.append({"validation/loss": entropy + margin}, 10)
    file.close()
    assert conclude(tmp_path, {"Train": 1.0}, 2.0) == status
    out, err = capsys.readouterr()
    assert f"{entropy:.3f}" in out and f"{entropy + margin:.3f}" in out and "blues ui --directory" in out
    assert ("learned no context" in err) is bool(status)


def test_a_run_without_validation_is_one_sentence(tmp_path):
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "metrics.jsonl").touch()
    with pytest.raises(BluesError, match="was never validated"):
        conclude(tmp_path, {}, 0.0)
