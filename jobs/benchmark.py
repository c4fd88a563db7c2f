"""Measure how fast Blues is, beside its peers in the same run and on the same data.

AREA is data, attention or model; all leave figures over rounds with their spread, recorded with commit, machine,
versions, seed and load as JSON, a table and a chart. A goal that the mean reaches is met; where a repeat misses it,
that is said. A peer that is not installed is named and skipped. Ctrl-C keeps what was measured.

data: preparing, loading, verifying, deduplicating and updating datasets, beside tiktoken, fastokens, Hugging
Face datasets, mosaicml-streaming, litdata and datasketch. What is prepared is Python source: the packages installed
beside Blues, or any number of folders (--corpus), every file once. Every run is a fresh process, and figures come with
the size of the data.

attention: what a model runs, beside every backend, at the shape of Blues-01 on a CUDA device: causal, window, decoding.

model: every variant of the search spaces that change the model (`blues sweep --list`), at equal tokens: step time,
processor time, peak memory and validation loss over seeds, each beside the default, and whether the figures can tell
it from chance. One space at `tiny` takes about ten minutes on two idle cores. The same command goes on after an
interruption.

examples:
  blues benchmark data
  blues benchmark data --only loader,verify --store-gb 1
  blues benchmark data --only prepare,incremental --corpus work/project .venv/lib --keep
  python -m venv peers && peers/bin/pip install mosaicml-streaming litdata datasets tiktoken
  blues benchmark data --peer-python peers/bin/python
  blues benchmark attention --only decoding --repeat 5
  blues benchmark model --only router,rope --steps 60 --seeds 3 --keep
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuning.benchmarks.bench import Bench


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("area", metavar="AREA", choices=tuple(AREAS), help=f"what is measured: {', '.join(AREAS)}")
    parser.add_argument("--only", metavar="GROUP,GROUP", help="only these groups of the area (default: all)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (model: a round is a seed, --seeds)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything that is drawn at random")
    parser.add_argument("--work", default="benchmark", metavar="DIR", help="folder for data (4 x the store) and logs")
    parser.add_argument(
        "--keep", action="store_true", help="leave the data there; a later run uses what it would make just so"
    )
    parser.add_argument("--output", default="benchmark.json", metavar="FILE", help="the record, with a chart beside")
    parser.add_argument("--peer-python", metavar="PATH", help="interpreter that has the peers (default: this one)")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--corpus",
        nargs="+",
        action="extend",
        metavar="DIR",
        help="folders of Python source, all of them together (default: the packages installed beside Blues)",
    )
    data.add_argument("--corpus-mb", type=float, metavar="X", help="megabytes of it, drawn at random (default: all)")
    data.add_argument("--store-gb", type=float, default=10.0, metavar="X", help="size of the dataset that is read")
    data.add_argument("--windows", type=int, default=100_000, metavar="N", help="windows of a run of a loader")
    data.add_argument("--num-workers", type=int, default=2, metavar="N", help="processes that prepare")
    attention = parser.add_argument_group("attention")
    attention.add_argument("--calls", type=int, default=20, metavar="N", help="calls of a round; their median counts")
    model = parser.add_argument_group("model")
    model.add_argument("--size", default="tiny", metavar="NAME", help="experiment that is varied, or its YAML file")
    model.add_argument("--steps", type=int, default=60, metavar="N", help="updates of a run")
    model.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of every variant, from --seed on")


def run(args: argparse.Namespace) -> int:
    from tuning.benchmarks.bench import Bench
    from tuning.benchmarks.record import Record

    bench = Bench(Path(args.work), Record(Path(args.output), vars(args)), args.repeat)
    try:
        AREAS[args.area](args, bench)
    finally:  # also what was measured before Ctrl-C
        table, chart = present(args.area, bench)
        print(table)
        for file in (bench.record.path, chart):
            if file is not None and file.exists():
                print(f"wrote {file}")
    return 1 if bench.record.failed else 0


def present(area: str, bench: Bench) -> tuple[str, Path | None]:
    """The table of what was measured, and the file of its chart (None where nothing was)."""
    picture = bench.record.path.with_suffix(".png")
    if area == "model":
        from tuning.benchmarks import model

        return model.table(bench.record), model.draw(bench.record, picture)
    from tuning.benchmarks.chart import draw

    return bench.record.table(), draw(bench.record, picture)


def run_data(args: argparse.Namespace, bench: Bench) -> None:
    from tuning.benchmarks.data import Options, measure

    options = Options(
        corpus=tuple(args.corpus or ()),
        corpus_mb=args.corpus_mb,
        store_gb=args.store_gb,
        windows=args.windows,
        workers=args.num_workers,
        seed=args.seed,
        peer_python=args.peer_python or sys.executable,
    )
    measure(bench, options, args.only, keep=args.keep)


def run_attention(args: argparse.Namespace, bench: Bench) -> None:
    from tuning.benchmarks.attention import benchmark

    benchmark(bench, args.only, calls=args.calls, seed=args.seed)


def run_model(args: argparse.Namespace, bench: Bench) -> None:
    from tuning.benchmarks.model import Options, benchmark

    options = Options(size=args.size, steps=args.steps, seeds=args.seeds, seed=args.seed)
    benchmark(bench, options, args.only, keep=args.keep)


AREAS = {"data": run_data, "attention": run_attention, "model": run_model}
"""What can be measured, and what does it; each has an argument group of its own above."""


if __name__ == "__main__":
    from blues.cli import run_job

    raise SystemExit(run_job("benchmark"))
