"""Take a checkpoint to a longer context: another rotary embedding, a little training, and figures before and after.

Makes a new run of the same weights, which every command understands, and prints perplexity by position, retrieval and
variable tracking: before, with the method untrained, and after. The same command again resumes; Ctrl-C leaves a
resumable run. What a method needs follows from the lengths (factor = N / trained length) unless an override says more.

examples:
  blues extend --checkpoint runs/tiny --length 1024 --method yarn --steps 200 --run-dir runs/tiny-1024
  blues extend --checkpoint runs/tiny --length 1024 --method ntk --steps 200 --data-cache-dir data/books --lr 1e-4
  blues extend --checkpoint runs/tiny --length 1024 --method yarn --steps 200 model.attention.rope.beta_fast=16
"""

from __future__ import annotations

import argparse

INTERRUPTED = 130
METHODS = ("yarn", "ntk", "dynamic_ntk", "linear", "longrope", "llama3", "base_change", "p_rope", "resonance", "none")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="run folder or checkpoint folder")
    parser.add_argument("--length", required=True, type=int, metavar="N", help="tokens of the new context")
    parser.add_argument(
        "--method", default="yarn", choices=METHODS, help="of the rotary embedding; none keeps it as it is"
    )
    parser.add_argument("--steps", required=True, type=int, metavar="S", help="updates at the new length")
    parser.add_argument("--lr", type=float, metavar="RATE", help="peak learning rate (default: a tenth of the run's)")
    parser.add_argument("--data-cache-dir", metavar="DIR", help="prepared or merged dataset (default: the run's own)")
    parser.add_argument("--run-dir", metavar="OUT", help="new run folder (default: runs/NAME-N-METHOD)")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="sequences and puzzles to measure")
    parser.add_argument("--device", default="auto", help="of the measurements: auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier run in the folder and start over")
    parser.add_argument("--address", help="running Ray cluster (default: RAY_ADDRESS, else a private local one)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changed settings of the new run")


def run(args: argparse.Namespace) -> int:
    from blues.cluster.extend import Extension, extend

    extension = Extension(length=args.length, method=args.method, steps=args.steps, lr=args.lr, samples=args.samples)
    extended = extend(
        args.checkpoint,
        args.run_dir,
        extension,
        data_path=args.data_cache_dir,
        overrides=args.overrides,
        device=args.device,
        address=args.address,
        fresh=args.fresh,
    )
    if extended.training.interrupted:
        return INTERRUPTED
    print(extended.table())
    print(f"figure: {extended.figure}")
    return 0


if __name__ == "__main__":
    from blues.cli import run_job

    raise SystemExit(run_job("extend"))
