"""The lines a person sees."""

import io

import pytest

from blues.cluster.progress import CLEAR_LINE, Progress, count, duration
from blues.training.observer import Event


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def start(step=0):
    facts = {
        "parameters": 424e6,
        "active_parameters": 254e6,
        "tokens_per_step": 4096,
        "world_size": 2,
        "device": "cpu",
        "dtype": "float32",
        "zero_stage": 1,
    }
    return Event(kind="start", step=step, details=facts)


def train(step, seconds=0.5):
    metrics = {
        "train/loss": 3.21449,
        "throughput/step_seconds": seconds,
        "throughput/tokens_per_second": 12_345.0,
        "experts/balance": 0.234,
    }
    return Event(kind="train", step=step, metrics=metrics)


VALIDATION = Event(
    kind="validation",
    step=120,
    metrics={
        "validation/loss": 3.05,
        "validation/perplexity": 21.1,
        "validation/loss/code": 2.9,
        "validation/loss/text": 3.4,
    },
)


def test_a_terminal_has_one_live_line_that_other_lines_push_down():
    out = Terminal()
    progress = Progress("tiny", 400, out=out)
    for event in (start(), train(119), train(120), VALIDATION):
        progress.show(event)
    heading = "tiny: 424M parameters (254M active per token), 4,096 tokens a step, 2 x cpu in float32, ZeRO 1\n"
    live = "step {}/400  loss 3.214  12.3k tokens/s  fullest expert +23%  {} left"
    validation = "step 120  validation loss 3.050 (perplexity 21.1)  code 2.900  text 3.400\n"
    assert out.getvalue() == (
        heading
        + CLEAR_LINE
        + live.format(119, "2m 21s")
        + CLEAR_LINE
        + live.format(120, "2m 20s")
        + CLEAR_LINE
        + validation
    )


def test_a_file_gets_plain_lines_now_and_then_and_the_last_one():
    out = io.StringIO()
    progress = Progress("tiny", 40, out=out, every_s=3600)
    for step in (10, 20, 30, 40):
        progress.show(train(step))
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["10/40", "40/40"] and "\r" not in out.getvalue()
    assert "left" in lines[0] and "left" not in lines[1]


def test_resumption_and_restart_are_told_apart():
    out = io.StringIO()
    progress = Progress("tiny", 40, out=out)
    progress.show(start(10))
    progress.show(start(20))
    assert "going on from step 10 of 40" in out.getvalue()
    assert "the workers were restarted and go on from step 20" in out.getvalue()


def test_a_warning_is_printed_once():
    out = io.StringIO()
    progress = Progress("tiny", 40, out=out)
    for _ in range(2):
        progress.show(Event(kind="warning", step=0, details={"message": "skipping a damaged checkpoint: x"}))
    assert out.getvalue() == "warning: skipping a damaged checkpoint: x\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.6, "5s"), (185, "3m 05s"), (7_800, "2h 10m"), (3 * 86_400 + 4 * 3_600, "3d 4h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(950, "950"), (12_345, "12.3k"), (424e6, "424M"), (1.5e12, "1.5T")])
def test_counts(number, text):
    assert count(number) == text
