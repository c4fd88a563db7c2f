"""Train an experiment, from its newest checkpoint if it has one.

EXPERIMENT is a name, such as tiny or blues01, or a YAML file, such as another run's experiment.yaml; any setting is
changed by `path.to.key=value`. The same command again resumes; Ctrl-C leaves a resumable run.

examples:
  blues train tiny --data-cache-dir data/notes
  blues train tiny --data-cache-dir data/notes --run-dir runs/wide model.dim=256 training.steps=1000
  blues train blues01 --data-cache-dir data/mix training.parallel.num_workers=8 --address auto
"""

from __future__ import annotations

import argparse

INTERRUPTED = 130
DEFAULT = "blues01"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "experiment", nargs="?", default=DEFAULT, metavar="EXPERIMENT", help="name or YAML file of an experiment"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changed settings, e.g. training.steps=1000")
    parser.add_argument("--data-cache-dir", metavar="DIR", help="prepared or merged dataset (data.path)")
    parser.add_argument("--run-dir", metavar="DIR", help="run folder (default: runs/NAME)")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier run in the folder and start over")
    parser.add_argument("--address", help="running Ray cluster (default: RAY_ADDRESS, else a private local one)")


def run(args: argparse.Namespace) -> int:
    from blues.cluster.train import run_training
    from tuning.experiments import resolve

    name, overrides = args.experiment, args.overrides
    if "=" in name:  # the experiment was left out, and the first override stands in its place
        name, overrides = DEFAULT, [name, *overrides]
    experiment = resolve(name, overrides)
    if args.data_cache_dir:
        experiment = experiment.override({"data.path": args.data_cache_dir})
    result = run_training(experiment, args.run_dir or f"runs/{experiment.name}", address=args.address, fresh=args.fresh)
    return INTERRUPTED if result.interrupted else 0


if __name__ == "__main__":
    from blues.cli import run_job

    raise SystemExit(run_job("train"))
