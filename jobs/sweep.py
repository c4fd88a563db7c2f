"""Ask which variant is better: train every point of a search space with every seed, and compare.

SPACE is a name (`blues sweep --list`), a list PATH=VALUE,VALUE, or several joined by *. Finished trials are not
trained again: the same command goes on where it was interrupted, and with more --seeds it adds the missing runs.

examples:
  blues sweep router --experiment tiny --data-cache-dir data/notes --seeds 3
  blues sweep 'router*model.moe.top_k=1,2' --experiment tiny --data-cache-dir data/notes training.steps=200
"""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("space", metavar="SPACE", nargs="?", help="what to vary: a name, or PATH=VALUE,VALUE")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of every trial")
    parser.add_argument("--experiment", default="tiny", metavar="NAME", help="name or YAML file of the base")
    parser.add_argument("--data-cache-dir", metavar="DIR", help="prepared or merged dataset (data.path)")
    parser.add_argument("--run-dir", metavar="DIR", help="folder of the sweep (default: runs/sweep-SPACE)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each variant; 3 show the spread")
    parser.add_argument("--trials", type=int, metavar="N", help="variants at most, drawn at random (default: all)")
    parser.add_argument("--concurrent", type=int, metavar="N", help="trials at a time (default: as many as fit)")
    parser.add_argument("--address", help="running Ray cluster (default: RAY_ADDRESS, else a private local one)")
    parser.add_argument("--list", action="store_true", help="list the named spaces")


def run(args: argparse.Namespace) -> int:
    from blues.errors import ConfigError
    from tuning import spaces, sweep
    from tuning.experiments import resolve

    if args.list:
        for name, function in spaces.SPACES.items():
            print(f"{name:<18} {(function.__doc__ or '').partition(chr(10))[0]}")
        return 0
    if args.space is None:
        raise ConfigError(f"say what to vary, e.g. `blues sweep router`; there are: {', '.join(spaces.SPACES)}")
    base = resolve(args.experiment, args.overrides)
    if args.data_cache_dir:
        base = base.override({"data.path": args.data_cache_dir})
    space = spaces.parse(args.space, base)
    trials = sweep.plan(base, space.sample(args.trials) if args.trials is not None else space, seeds=args.seeds)
    name = sweep.slug(f"sweep {args.space}")
    print(f"{len(trials)} trials of {base.training.steps:,} steps: {', '.join(trial.name for trial in trials)}")
    folder = args.run_dir or f"runs/{name}"
    try:
        result = sweep.run_sweep(trials, folder, name=name, max_concurrent=args.concurrent, address=args.address)
    except KeyboardInterrupt:
        print("\nThe same command goes on from the newest checkpoint of every trial.", file=sys.stderr)
        raise
    if result.comparison is not None:
        print(f"\n{result.comparison.table()}\n\n{result.comparison.verdict()}\n")
        print("\n".join(f"wrote {file}" for file in result.files))
    for trial, reason in result.failed.items():
        print(f"failed: {trial}: {reason}", file=sys.stderr)
    return 1 if result.failed else 0


if __name__ == "__main__":
    from blues.cli import run_job

    raise SystemExit(run_job("sweep"))
