"""Remove documents that repeat another one, exactly or nearly, within a dataset and across several.

The first dataset has the best right to keep a document, then its order counts; validation documents come before all
training documents, so training never keeps a copy of what it is validated on. Nothing is copied: each dataset that
loses documents gets a new version with removed.parquet (what was removed, for which document, how similar); the old
version stays, and a merged dataset keeps using it until it is merged again. An update starts from all documents of the
sources; remove the duplicates again after it.

examples:
  blues dedup data/code
  blues dedup data/code data/text --threshold 0.8 --report duplicates.html
  blues dedup data/code data/text --exact-only --dry-run
"""

from __future__ import annotations

import argparse
import sys
import time

PLAIN_LINE_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("datasets", nargs="+", metavar="DIR", help="folders made by `blues prepare`, the best first")
    parser.add_argument("--exact-only", action="store_true", help="only documents with equal tokens")
    parser.add_argument(
        "--threshold", type=float, default=0.7, metavar="X", help="least similarity (Jaccard) of a near copy"
    )
    parser.add_argument("--ngram", type=int, default=5, metavar="N", help="tokens of a shingle")
    parser.add_argument("--permutations", type=int, default=128, metavar="N", help="places of a MinHash signature")
    parser.add_argument("--across-only", action="store_true", help="let each dataset repeat itself")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    parser.add_argument("--report", metavar="FILE", help="write a page (HTML) with examples beside what they repeat")
    parser.add_argument("--num-workers", type=int, metavar="N", help="processes (default: one for each CPU)")
    parser.add_argument("--address", help="running Ray cluster (default: RAY_ADDRESS, else a private local one)")


def run(args: argparse.Namespace) -> int:
    from blues.cluster.dedup import Request, dedup
    from blues.config import write_atomic
    from blues.data.dedup.dedup_report import page
    from blues.data.dedup.minhash import Settings
    from blues.data.reports.page import PAGE_SUFFIXES
    from blues.data.storage.manifest import check_target
    from blues.errors import ConfigError

    if args.num_workers is not None and args.num_workers < 1:
        raise ConfigError(f"--num-workers must be at least 1, got {args.num_workers}")
    if args.report:
        check_target(args.report, "--report", PAGE_SUFFIXES)
    settings = None if args.exact_only else Settings(args.threshold, args.ngram, args.permutations)
    screen = Screen()
    result = dedup(
        args.datasets,
        Request(settings, args.across_only),
        dry_run=args.dry_run,
        num_workers=args.num_workers,
        address=args.address,
        report=screen.show,
    )
    screen.clear()
    if result.summary is None:
        print("the duplicates were removed before, with the same options; nothing is left to do")
        return 0
    print(result.summary.text())
    if args.report:
        write_atomic(args.report, page(result.summary, result.before, "Duplicates").encode("utf-8"))
    print("\n".join(ending(result, args)))
    return 0


def ending(result, args: argparse.Namespace) -> list[str]:
    """Where it is now."""
    changed = [(old, new) for old, new in zip(result.before, result.after, strict=True) if new.version != old.version]
    lines = ["", *(f"{new.path}: version {new.version} without them ({old.version} stays)" for old, new in changed)]
    if args.dry_run:
        lines.append("nothing was changed (--dry-run)")
    elif not changed:
        lines.append("nothing to remove; no new version was made")
    else:
        lines.append("merge again where a merged dataset is to use the new versions")
    return lines + ([f"examples: {args.report}"] if args.report else [])


class Screen:
    """The live line (plain lines where there is no terminal)."""

    WORDS = {
        "signatures": "{:,} of {:,} documents have a signature",
        "exact": "{:,} of {:,} possible copies compared",
        "near": "{} of {} bands searched for near copies",
        "choice": "{:,} of {:,} groups of copies decided",
    }

    def __init__(self) -> None:
        self.interactive = sys.stderr.isatty()
        self.last = time.monotonic()

    def show(self, progress) -> None:
        pause = 0.1 if self.interactive else PLAIN_LINE_S
        if time.monotonic() - self.last < pause:
            return
        self.last = time.monotonic()
        line = self.WORDS[progress.stage].format(progress.done, progress.total)
        sys.stderr.write(f"\r\x1b[2K{line}" if self.interactive else f"{line}\n")
        sys.stderr.flush()

    def clear(self) -> None:
        if self.interactive:
            sys.stderr.write("\r\x1b[2K")


if __name__ == "__main__":
    from blues.cli import run_job

    raise SystemExit(run_job("dedup"))
