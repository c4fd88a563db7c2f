"""Mix prepared datasets by weight into one that can be trained on: as a plan over them, or written out as their like.

The strategies: weighted (as --weights says), equal (the same share for each), proportional (as many samples as each has
tokens). Weights are shares of the training samples on any positive scale: 7 3 is 0.7 0.3. Without --materialize no
token is copied. DIR@2 is version 2 of a dataset; the versions that are taken stay, whatever becomes of the dataset.

A file can say what is merged, with paths relative to its own folder; options of the command line replace its values:
  datasets: {paths: [code, text], weights: [0.7, 0.3], merge_strategy: weighted}

examples:
  blues merge --datasets data/code data/text --weights 0.7 0.3 --output data/mix --verify
  blues merge --config mix.yaml --output data/mix
  blues merge --datasets data/a data/b --strategy equal --materialize --compression zstd --output data/ab
  blues merge --datasets data/code@3 --materialize --keep-order --output data/code-compact
"""

from __future__ import annotations

import argparse
import sys
import time

PLAIN_LINE_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--datasets", nargs="+", metavar="DIR", help="prepared or merged datasets; DIR@2 for a version")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one for each dataset, if weighted")
    parser.add_argument("--strategy", "--merge-strategy", metavar="NAME", help="weighted, equal or proportional")
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with the key `datasets`")
    parser.add_argument("--output", "--data-cache-dir", required=True, metavar="DIR", help="the merged dataset")
    parser.add_argument("--overwrite", action="store_true", help="replace another merged dataset there")
    parser.add_argument("--verify", action="store_true", help="read and check everything after the merge")
    parser.add_argument("--page", metavar="FILE", help="verify, and write the report as a page (HTML) with plots")
    written = parser.add_argument_group("writing the mixture out")
    written.add_argument("--materialize", action="store_true", help="copy the documents into a dataset of their own")
    written.add_argument("--tokens", type=int, metavar="N", help="training tokens (default: all, none twice)")
    written.add_argument("--seed", type=int, metavar="N", help="of the order of the documents (default: 0)")
    written.add_argument("--keep-order", action="store_true", help="one dataset as it stands, in whole chunks")
    written.add_argument("--shard-tokens", type=int, metavar="N", help="tokens of a chunk (default: 16,777,216)")
    written.add_argument("--compression", metavar="NAME", help="none or zstd (default: none)")
    written.add_argument("--num-workers", type=int, metavar="N", help="processes (default: one for each CPU)")
    written.add_argument("--address", help="running Ray cluster (default: RAY_ADDRESS, else a private local one)")


ONLY_WRITTEN = ("tokens", "seed", "keep_order", "shard_tokens", "compression", "num_workers", "address")
"""Options that mean nothing without --materialize."""


def run(args: argparse.Namespace) -> int:
    if args.page:
        from blues.data.reports.page import PAGE_SUFFIXES
        from blues.data.storage.manifest import check_target

        check_target(args.page, "--page", PAGE_SUFFIXES)
    paths, weights, strategy = chosen(args)
    print(write_out(args, paths, weights, strategy) if args.materialize else plan(args, paths, weights, strategy))
    return check(args) if args.verify or args.page else 0


def check(args: argparse.Namespace) -> int:
    """Read what was merged, print a report and write its page; returns the exit status."""
    from blues.data.reports.verify import verify

    report = verify(args.output)
    print(f"\n{report.table()}")
    if args.page:
        from blues.data.reports.page import write_page

        print(f"page: {write_page(report, args.page)}")
    return 0 if report.good else 2


def plan(args: argparse.Namespace, paths, weights, strategy) -> str:
    """Write the mixture as a plan over its sources; returns a table of them."""
    from blues.data.merging.merge import merge, mixture_table
    from blues.errors import ConfigError

    for name in ONLY_WRITTEN:
        if getattr(args, name) is not None and getattr(args, name) is not False:
            raise ConfigError(f"--{name.replace('_', '-')} needs --materialize: a mixture alone copies nothing")
    dataset = merge(paths, args.output, weights=weights, strategy=strategy, overwrite=args.overwrite, report=say)
    return mixture_table(dataset)


def say(line: str) -> None:
    print(f"blues merge: {line}", file=sys.stderr)


def chosen(args: argparse.Namespace):
    """Paths, weights and strategy: those of the options, and of the file where there is no option."""
    from blues.data.merging.merge import read_ingredients
    from blues.errors import ConfigError

    if args.config is None:
        if args.datasets is None:
            raise ConfigError("name what is merged: --datasets DIR DIR ..., or a file that does with --config FILE")
        return args.datasets, args.weights, args.strategy or "weighted"
    file = read_ingredients(args.config, report=say)
    paths, weights, strategy = file.paths, file.weights, file.merge_strategy
    if args.datasets is not None:
        paths = args.datasets
        say(f"--datasets instead of the paths of {args.config}")
    if args.strategy is not None and args.strategy != strategy:
        say(f"--strategy {args.strategy} instead of {strategy} of {args.config}")
        strategy = args.strategy
        weights = weights if strategy == "weighted" else None
    if args.weights is not None:
        weights = args.weights
        say(f"--weights instead of those of {args.config}")
    return paths, weights, strategy


def write_out(args: argparse.Namespace, paths, weights, strategy) -> str:
    """Copy the mixture into a dataset of its own; returns the table of what was written."""
    from blues.cluster.materialize import materialize
    from blues.data.merging.merge import combine
    from blues.data.merging.mixed_shards import Settings
    from blues.errors import ConfigError

    if args.num_workers is not None and args.num_workers < 1:
        raise ConfigError(f"--num-workers must be at least 1, got {args.num_workers}")
    given = {name: getattr(args, name) for name in ("tokens", "seed", "keep_order", "shard_tokens", "compression")}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    combined = combine(paths, weights, strategy)
    line = Line()
    made = materialize(
        combined,
        args.output,
        settings,
        overwrite=args.overwrite,
        num_workers=args.num_workers,
        address=args.address,
        report=line.show,
    )
    line.clear()
    for remark in combined.remarks():
        say(remark)
    return "\n".join(summary(made))


class Line:
    """The live line (plain lines where there is no terminal)."""

    def __init__(self) -> None:
        self.interactive = sys.stderr.isatty()
        self.last = time.monotonic()

    def show(self, state) -> None:
        from blues.cluster.progress import count

        done = state.shards_done == state.shards
        if not self.interactive and (done or time.monotonic() - self.last < PLAIN_LINE_S):
            return
        self.last = time.monotonic()
        line = (
            f"{state.shards_done:,} of {state.shards:,} shards  {count(state.documents_done)} documents  "
            f"{count(state.tokens_done)} of {count(state.tokens)} tokens  {count(state.rate)} tokens/s"
        )
        sys.stderr.write(f"\r\x1b[2K{line}" if self.interactive else f"{line}\n")
        sys.stderr.flush()

    def clear(self) -> None:
        if self.interactive:
            sys.stderr.write("\r\x1b[2K")


def summary(made) -> list[str]:
    """What was written of what, in lines."""
    from blues.data.merging.materialize import written_table

    store, state = made.store, made.progress
    lines = [*written_table(store), ""]
    for split, tree in store.manifest["splits"].items():
        lines.append(
            f"  {split:<11} {tree['documents']:>9,} documents  {tree['tokens']:>13,} tokens  "
            f"{len(tree['chunks']):>5} chunks"
        )
    if state is None:
        return [*lines, "  it was there already; nothing was done"]
    before = f", {state.resumed:,} of {state.shards:,} shards from an earlier start" if state.resumed else ""
    return [*lines, f"  {state.seconds:.1f} s, {4e-6 * state.rate:,.0f} MB of tokens a second{before}"]


if __name__ == "__main__":
    from blues.cli import run_job

    raise SystemExit(run_job("merge"))
