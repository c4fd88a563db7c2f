"""Show what is in a dataset: its sources, lengths of documents, some documents with their tokens, a training sample.

Without options: a table of every source and split, where it came from, and histograms of lengths; no token is read.
(The module's name ends in _ for the sake of Python's own `inspect`, which `python jobs/...` would not find any more.)

examples:
  blues inspect data/notes
  blues inspect data/notes --plot lengths.png
  blues inspect data/mix --documents 3 --source "*.py" --seed 1
  blues inspect data/mix --window 0 --sequence-length 512 --packing best_fit
"""

from __future__ import annotations

import argparse
import io
import os
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DIR", help="a prepared or merged dataset; DIR@2 is version 2")
    parser.add_argument("--json", action="store_true", help="print what is shown as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw the histogram of lengths (.png, .svg or .pdf)")
    parser.add_argument(
        "--split", metavar="NAME", help="train or validation (default: documents of both, windows of train)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of documents, and of the run")
    parser.add_argument("--max-tokens", type=int, default=400, metavar="N", help="tokens of a document that are shown")
    documents = parser.add_argument_group("documents")
    documents.add_argument("--documents", type=int, metavar="N", help="show so many, drawn at random")
    documents.add_argument("--source", metavar="GLOB", help="only of files with such a name")
    documents.add_argument("--id", metavar="ID", help="only with this id")
    window = parser.add_argument_group("a training sample")
    window.add_argument("--window", type=int, metavar="INDEX", help="show what sample INDEX of a run is")
    window.add_argument("--sequence-length", type=int, metavar="T", help="tokens of a sample (default: 2048)")
    window.add_argument("--packing", metavar="NAME", help="stream or best_fit (default: stream)")


def run(args: argparse.Namespace) -> int:
    check(args)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character shows its number
    if args.documents is not None or args.id is not None or args.source is not None:
        lines = documents(args)
    elif args.window is not None:
        lines = window(args)
    else:
        lines = overview(args)
    for line in lines:
        print(line)
    return 0


def check(args: argparse.Namespace) -> None:
    """Options that contradict one another, or the data."""
    from blues.config import nearest
    from blues.data.storage.manifest import check_target
    from blues.data.storage.store import SPLITS
    from blues.errors import ConfigError

    if args.split is not None and args.split not in SPLITS:
        raise ConfigError(f"unknown split {args.split!r}.{nearest(args.split, SPLITS)}")
    if args.max_tokens < 1:
        raise ConfigError(f"--max-tokens must be at least 1, got {args.max_tokens}")
    looks = [name for name in ("documents", "source", "id") if getattr(args, name) is not None]
    if looks and args.window is not None:
        raise ConfigError(f"--window and --{looks[0]} are two looks; ask for one at a time")
    for name in ("sequence_length", "packing"):
        if getattr(args, name) is not None and args.window is None:
            raise ConfigError(f"--{name.replace('_', '-')} says how a sample is made; name one with --window INDEX")
    if args.plot:
        from blues.data.reports.figures import FIGURE_SUFFIXES

        check_target(args.plot, "--plot", FIGURE_SUFFIXES)


def overview(args: argparse.Namespace) -> list[str]:
    from blues.data.reports import display, inspection

    found = inspection.overview(args.dataset)
    lines = [inspection.to_json(found)] if args.json else display.overview_lines(found)
    if args.plot:
        from blues.data.reports.figures import lengths_figure

        written = lengths_figure(found, args.plot)
        lines += [] if args.json else ["", f"lengths: {written}"]
    return lines


def documents(args: argparse.Namespace) -> list[str]:
    from blues.data.reports import display, inspection
    from blues.data.storage.store import SPLITS

    tokenizer = inspection.tokenizer_of(args.dataset)
    found = inspection.choose_documents(
        args.dataset,
        1 if args.documents is None else args.documents,
        seed=args.seed,
        splits=SPLITS if args.split is None else (args.split,),
        source=args.source,
        id=args.id,
    )
    if args.json:
        return [inspection.to_json([inspection.with_text(look, tokenizer) for look in found])]
    return [
        line for look in found for line in display.document_lines(look, tokenizer, args.max_tokens, color=colored())
    ]


def window(args: argparse.Namespace) -> list[str]:
    from blues.data.reports import display, inspection

    tokenizer = inspection.tokenizer_of(args.dataset)
    found = inspection.training_window(
        args.dataset,
        args.window,
        2048 if args.sequence_length is None else args.sequence_length,
        split=args.split or "train",
        seed=args.seed,
        packing=args.packing or "stream",
    )
    if args.json:
        return [inspection.to_json(found)]
    return display.window_lines(found, tokenizer, args.max_tokens, color=colored())


def colored() -> bool:
    """Whether the output is a terminal whose owner has nothing against colours (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


if __name__ == "__main__":
    from blues.cli import run_job

    raise SystemExit(run_job("inspect"))
