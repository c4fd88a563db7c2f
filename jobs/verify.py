"""Read whole datasets and check them: every file of every version, the documents, the tokenizer; print statistics.

Exit status 2 if anything is wrong; every issue names the file. What a person should judge (training documents that are
copies of validation documents, files that belong to no version) is a warning and changes no exit status.

examples:
  blues verify data/notes
  blues verify data/mix --page verify.html
  blues verify data/code data/text --json
"""

from __future__ import annotations

import argparse
import sys
import time

PLAIN_LINE_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("datasets", nargs="+", metavar="DIR", help="prepared or merged datasets; DIR@2 is version 2")
    parser.add_argument(
        "--sample", type=int, default=200, metavar="N", help="documents of each dataset that are tokenized again"
    )
    parser.add_argument("--page", metavar="FILE", help="write the report as a page (HTML) with plots")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--num-workers", type=int, metavar="N", help="threads that read (default: one for each CPU)")


def run(args: argparse.Namespace) -> int:
    from blues.data.reports.verify import verify

    if args.page:
        from blues.data.reports.page import PAGE_SUFFIXES, write_page
        from blues.data.storage.manifest import check_target

        check_target(args.page, "--page", PAGE_SUFFIXES)
    line = Line()
    report = verify(*args.datasets, sample=args.sample, num_workers=args.num_workers, report=line.show)
    line.clear()
    print(report.json() if args.json else report.table())
    if args.page:
        print(f"page: {write_page(report, args.page)}", file=sys.stderr if args.json else sys.stdout)
    return 0 if report.good else 2


class Line:
    """The live line (plain lines where there is no terminal, of what takes long)."""

    def __init__(self) -> None:
        self.interactive = sys.stderr.isatty()
        self.began = self.last = time.monotonic()
        self.source = ""

    def show(self, state) -> None:
        now = time.monotonic()
        if state.source != self.source:
            self.source, self.began = state.source, now
        if not self.interactive and now - self.last < PLAIN_LINE_S:
            return
        self.last = now
        line = f"{state.source}: {state.bytes_done / 1e9:,.2f} of {state.bytes / 1e9:,.2f} GB read"
        if now - self.began > 1:
            line += f"  {state.bytes_done / 1e9 / (now - self.began):.2f} GB/s"
        sys.stderr.write(f"\r\x1b[2K{line}" if self.interactive else f"{line}\n")
        sys.stderr.flush()

    def clear(self) -> None:
        if self.interactive:
            sys.stderr.write("\r\x1b[2K")


if __name__ == "__main__":
    from blues.cli import run_job

    raise SystemExit(run_job("verify"))
