"""`python -m tuning.benchmarks.attention`: measure attention on this machine, print the table, write the record."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tuning.benchmarks.attention.measure import measure
from tuning.benchmarks.attention.shapes import SHAPES
from tuning.benchmarks.record import Record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tuning.benchmarks.attention")
    parser.add_argument("--output", default="attention.json", metavar="FILE", help="the record")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds")
    parser.add_argument("--calls", type=int, default=20, metavar="N", help="calls of a round; their median counts")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the queries, keys and values")
    args = parser.parse_args()
    if args.repeat < 1 or args.calls < 1:
        parser.error(f"--repeat and --calls must be at least 1, got {args.repeat} and {args.calls}")
    if not torch.cuda.is_available():
        parser.error("attention is measured on a CUDA device, and torch finds none here")
    record = Record(Path(args.output), vars(args))
    try:
        measure(record, SHAPES, device=torch.device("cuda"), repeat=args.repeat, calls=args.calls, seed=args.seed)
    finally:  # also what was measured before Ctrl-C
        print(record.table())
        print(f"wrote {record.path}")
    return 1 if record.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
