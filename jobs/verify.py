"""Read a whole dataset and check it: sizes, checksums, documents, tokenizer; print its statistics.

Exit status 2 if anything is wrong; every issue names the file.

examples:
  blues verify data/notes
  blues verify data/mix --json
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DIR", help="a prepared or merged dataset")
    parser.add_argument(
        "--sample", type=int, default=200, metavar="N", help="documents of each dataset that are tokenized again"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    from blues.data.verify import verify

    report = verify(args.dataset, sample=args.sample)
    print(report.json() if args.json else report.table())
    return 0 if report.good else 2


if __name__ == "__main__":
    from blues.cli import run_job

    raise SystemExit(run_job("verify"))
