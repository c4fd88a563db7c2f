"""Make a trained model smaller: take the experts away that matter least, and train on a little.

Scores every expert on tokens of the dataset, then removes, replaces or merges those that do not stay. Prints the scores
and the validation loss before, after, and after recovery. OUTPUT is an ordinary run: generate, evaluate and train read
it. The same command again resumes the recovery; Ctrl-C leaves it resumable.

examples:
  blues prune --checkpoint runs/notes --output runs/notes-4 --criterion reap --keep 4 --recover-steps 200
  blues prune --checkpoint runs/notes --output runs/notes-mean --action mean_output --ratio 0.5 --scope global
  blues prune --checkpoint runs/other --output runs/other-4 --replay runs/notes-4/pruning/recipe.yaml
"""

from __future__ import annotations

import argparse

INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="run folder or checkpoint folder")
    parser.add_argument("--output", required=True, metavar="RUN_DIR", help="folder of the pruned run")
    parser.add_argument("--data-cache-dir", metavar="DIR", help="dataset to score and recover on (default: the run's)")
    parser.add_argument(
        "--criterion", default="reap", metavar="NAME", help="what scores an expert; `blues variants pruning_criterion`"
    )
    parser.add_argument(
        "--action", default="remove", metavar="NAME", help="what becomes of the others; `blues variants pruning_action`"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--keep", type=int, metavar="N", help="experts that stay in a layer")
    size.add_argument("--ratio", type=float, metavar="SHARE", help="share of the experts that goes")
    size.add_argument("--dead", action="store_true", help="take away what dynamic pruning has switched off")
    size.add_argument("--replay", metavar="FILE", help="apply this recipe instead of measuring")
    parser.add_argument(
        "--scope", choices=("layer", "global"), default="layer", help="where the budget holds: in each layer, or in all"
    )
    parser.add_argument("--tokens", type=int, default=65_536, metavar="N", help="tokens to score on")
    parser.add_argument("--split", choices=("train", "validation"), default="train", help="split they are drawn from")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which of them are drawn")
    parser.add_argument(
        "--attention", type=float, metavar="SHARE", help="also leave out blocks of attention; this share of it stays"
    )
    parser.add_argument("--block", type=int, default=64, metavar="N", help="tokens of such a block")
    parser.add_argument("--recover-steps", type=int, default=0, metavar="N", help="steps of training afterwards")
    parser.add_argument(
        "--recover-lr", type=float, metavar="RATE", help="their learning rate (default: the run's / 10)"
    )
    parser.add_argument("--recipe", metavar="FILE", help="write the recipe here too")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier pruning in the folder and start over")
    parser.add_argument("--address", help="running Ray cluster (default: RAY_ADDRESS, else a private local one)")
    parser.add_argument("--device", default="auto", help="to score on: auto, cpu, cuda, cuda:1, ...")


def run(args: argparse.Namespace) -> int:
    from blues.cluster.prune import prune_run, settings

    report = prune_run(
        args.checkpoint,
        settings(**{name: getattr(args, name) for name in SETTINGS}),
        args.output,
        data_path=args.data_cache_dir,
        recipe_path=args.recipe,
        replay=args.replay,
        fresh=args.fresh,
        address=args.address,
        device=args.device,
    )
    return INTERRUPTED if report.interrupted else 0


SETTINGS = (
    *("criterion", "action", "keep", "ratio", "dead", "scope", "tokens", "split", "seed"),
    *("attention", "block", "recover_steps", "recover_lr", "replay"),
)


if __name__ == "__main__":
    from blues.cli import run_job

    raise SystemExit(run_job("prune"))
