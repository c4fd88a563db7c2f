"""Mix prepared datasets by weight into one that can be trained on, without copying a token.

The strategies: weighted (as --weights says), equal (the same share for each), proportional (as many samples as each has
tokens). Weights are shares of the training samples on any positive scale: 7 3 is 0.7 0.3.

examples:
  blues merge --datasets data/code data/text --weights 0.7 0.3 --output data/mix --verify
  blues merge --datasets data/a data/b data/c --strategy equal --output data/mix
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--datasets", nargs="+", required=True, metavar="DIR", help="folders made by `blues prepare`")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one for each dataset, if weighted")
    parser.add_argument("--strategy", default="weighted", metavar="NAME", help="weighted, equal or proportional")
    parser.add_argument("--output", "--data-cache-dir", required=True, metavar="DIR", help="the merged dataset")
    parser.add_argument("--overwrite", action="store_true", help="replace another merged dataset there")
    parser.add_argument("--verify", action="store_true", help="read and check everything after the merge")


def run(args: argparse.Namespace) -> int:
    from blues.data.merge import merge
    from blues.data.verify import mixture_table, verify

    dataset = merge(args.datasets, args.output, weights=args.weights, strategy=args.strategy, overwrite=args.overwrite)
    if not args.verify:
        print(mixture_table(dataset))
        return 0
    report = verify(args.output)
    print(report.table())
    return 0 if report.good else 2


if __name__ == "__main__":
    from blues.cli import run_job

    raise SystemExit(run_job("merge"))
