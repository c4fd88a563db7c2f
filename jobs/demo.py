"""The whole journey on real data: prepare, verify, merge, train, sweep, compare, generate - in minutes, without a GPU.

The data is what every machine with Python has: the interpreter's standard library as code, and the documentation of
its other half as English. Every stage is a command that can be typed; the demo prints it. Run it again after an
interruption and it goes on where it stopped.

examples:
  blues demo
  blues demo --output /tmp/demo
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from blues.errors import BluesError

CODE_BYTES, TEXT_BYTES = 3_500_000, 2_000_000
VOCAB_SIZE = 4096
SWEEP_STEPS = 100
ROUTERS = "model.moe.router=noisy_top_k,softmax_top_k"
"""Two of the routers: `blues sweep router` asks about all of them and takes six times as long."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="demo", metavar="DIR", help="where everything is written")


def run(args: argparse.Namespace) -> int:
    from blues.cluster.session import connect
    from blues.tracking.server import LocalServer

    place, start = Path(args.output), time.monotonic()
    place.mkdir(parents=True, exist_ok=True)
    demo = Demo(stages(place))
    # One Ray and one MLflow server for all stages; a command that is typed alone starts and stops its own.
    with connect("local", num_cpus=2), LocalServer(place / "mlflow"):
        status = demo.run()
    return status or conclude(place, demo.seconds, time.monotonic() - start)


@dataclass(frozen=True)
class Stage:
    """A step of the demo: the words of a `blues` command, or a function. done: whether an earlier demo did it."""

    title: str
    command: tuple[str, ...] = ()
    function: Callable[[], None] | None = None
    done: Callable[[], bool] = lambda: False


@dataclass
class Demo:
    """Runs stages in order, with a heading and the time of each."""

    stages: list[Stage]
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> int:
        """The status of the first stage that failed, else 0."""
        for number, stage in enumerate(self.stages, start=1):
            print(f"\n[{number}/{len(self.stages)}] {stage.title}", flush=True)
            if stage.command:
                print(f"$ blues {shlex.join(stage.command)}", flush=True)
            if stage.done():
                print("done by an earlier run of the demo")
                continue
            with self._timed(stage.title):
                status = self._perform(stage)
            if status:
                print(f"\nThe demo stopped at stage {number}; `blues demo` goes on from here.", file=sys.stderr)
                return status
        return 0

    def _perform(self, stage: Stage) -> int:
        from blues.cli import run_job

        if stage.function is not None:
            stage.function()
            return 0
        return run_job(stage.command[0], stage.command[1:])

    @contextlib.contextmanager
    def _timed(self, title: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[title] = time.monotonic() - start
        print(f"({self.seconds[title]:.0f} s)", flush=True)


def stages(place: Path) -> list[Stage]:
    """The journey below the folder `place`."""
    raw, data, runs = place / "raw", place / "data", place / "runs"
    mix, tiny, mlflow = str(data / "mix"), str(runs / "tiny"), f"tracking.directory={place / 'mlflow'}"
    vocabulary = ("--vocab-size", str(VOCAB_SIZE))
    return [
        Stage(
            f"Collect real data: the library of Python {sys.version_info.major}.{sys.version_info.minor}",
            function=lambda: collect(raw),
            done=lambda: (raw / "code").is_dir() and (raw / "text.jsonl").is_file(),
        ),
        Stage(
            "Prepare the code: read, tokenize, write chunks",
            ("prepare", "--input-dir", f"{raw / 'code'}", "--data-cache-dir", f"{data / 'code'}", *vocabulary),
            done=lambda: (data / "code" / "manifest.json").is_file(),
        ),
        Stage(
            "Prepare the English text",
            ("prepare", "--dataset", f"{raw / 'text.jsonl'}", "--data-cache-dir", f"{data / 'text'}", *vocabulary),
            done=lambda: (data / "text" / "manifest.json").is_file(),
        ),
        Stage("Verify a dataset", ("verify", f"{data / 'code'}")),
        Stage(
            "Mix 70% code with 30% text",
            ("merge", "--datasets", f"{data / 'code'}", f"{data / 'text'}", "--weights", "0.7", "0.3")
            + ("--strategy", "weighted", "--output", mix, "--verify"),
            done=lambda: (data / "mix" / "mixture.json").is_file(),
        ),
        Stage(
            "Train a mixture of experts with two workers (Ray Train + DeepSpeed)",
            ("train", "tiny", "--data-cache-dir", mix, "--run-dir", tiny, mlflow),
        ),
        Stage(
            "Ask which router is better (Ray Tune)",
            ("sweep", ROUTERS, "--experiment", "tiny", "--data-cache-dir", mix, "--run-dir", f"{runs / 'routers'}")
            + (mlflow, f"training.steps={SWEEP_STEPS}", f"training.validate_every={SWEEP_STEPS // 4}"),
        ),
        Stage(
            "Generate code",
            ("generate", "--checkpoint", tiny, "--prompt", "def __init__(self", "--max-length", "80", "--seed", "1"),
        ),
        Stage(
            "Generate English",
            ("generate", "--checkpoint", tiny, "--prompt", "Return the", "--max-length", "60", "--seed", "1"),
        ),
    ]


def collect(raw: Path) -> None:
    """Write the standard library's code and its documentation."""
    from blues.data.reading.standard_library import write_code, write_text

    code = write_code(raw / "code", max_bytes=CODE_BYTES)
    text = write_text(raw / "text.jsonl", max_bytes=TEXT_BYTES)
    print(f"{code.documents:,} files of code, {code.size / 1e6:.1f} MB, in {code.path}")
    print(f"{text.documents:,} docstrings and help topics of other modules, {text.size / 1e6:.1f} MB, in {text.path}")


def conclude(place: Path, seconds: dict[str, float], total: float) -> int:
    """Say what came out: whether anything was learned, and where to look. Status 1 if nothing was."""
    from blues.evaluation.unigram import unigram_entropy
    from blues.tracking.plots import figures
    from blues.tracking.spool import read_history

    run_dir = place / "runs" / "tiny"
    losses = read_history(run_dir / "metrics.jsonl").get("validation/loss")
    if not losses:
        raise BluesError(f"run {str(run_dir)!r} was never validated; delete it and run the demo again")
    loss, entropy = losses[-1][1], unigram_entropy(place / "data" / "mix")
    drawn = figures(run_dir, name="tiny", unigram_entropy=entropy.own)
    learned = loss < entropy.own
    print(f"\nDone in {total:.0f} s, with starting and stopping Ray and MLflow")
    for title, taken in seconds.items():
        print(f"  {taken:5.0f} s  {title}")
    print(f"\nvalidation loss     {loss:.3f} nats per token of held-out text")
    print(f"unigram entropy     {entropy.own:.3f}  (what knowing only the held-out token frequencies would give)")
    print(f"unigram of training {entropy.trained:.3f}  (what knowing only the training token frequencies gives)")
    if not learned:
        print("\nThe model did not get below the unigram entropy: it has learned no context.", file=sys.stderr)
    print("\nfigures:")
    for path in [*drawn, place / "runs" / "routers" / "comparison.png"]:
        print(f"  {path}")
    print(f"\nall runs in MLflow:\n  blues ui --directory {shlex.quote(str(place / 'mlflow'))}")
    print(f"go on from here:\n  blues generate --checkpoint {shlex.quote(str(run_dir))} --prompt 'import '")
    return 0 if learned else 1


if __name__ == "__main__":
    from blues.cli import run_job

    raise SystemExit(run_job("demo"))
