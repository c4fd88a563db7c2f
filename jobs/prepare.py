"""Turn raw files into a dataset: read, tokenize, and write chunks with a manifest, in parallel with Ray Data.

Reads CSV, TSV, JSON Lines (also .gz and .zst), Parquet, plain text and source code: from this machine, from any URL
that fsspec reads (https, s3, gs, zip, ...), or from a commit of a git repository, of which nothing is checked out. Rows
that cannot be used are not lost: they are listed with file, row and reason in quarantine.jsonl.

Rows of tables and files of source code stay whole, up to --max-document-mb; text files above 256 KiB are cut at empty
lines into documents of about that size, named file:number.

The same command again goes on after an interruption, and does nothing when the dataset is there. When files have
changed, or a repository has moved to another commit, --update reads just what is new.

examples:
  blues prepare --dataset notes.csv --data-cache-dir data/notes
  blues prepare --dataset posts.jsonl.gz --text-column body --id-column url --data-cache-dir data/posts
  blues prepare --dataset https://example.org/posts.parquet --metadata-columns author date --data-cache-dir data/posts
  blues prepare --input-dir src --vocab-size 4096 --data-cache-dir data/code
  blues prepare --input-dir work/project --commit v2.0 --data-cache-dir data/project --update
  blues prepare --dataset git+https://example.org/project.git --commit main --data-cache-dir data/project
"""

from __future__ import annotations

import argparse
import functools
import sys
import time

PLAIN_LINE_S = 5.0
MOST_LISTED = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--dataset", metavar="FILE", help="a file of any of the formats above, a URL, or git+URL of a git repository"
    )
    source.add_argument("--input-dir", metavar="DIR", help="a folder: every file below it that Blues can read")
    parser.add_argument(
        "--commit", "--ref", metavar="NAME", help="read a git repository as it is in this commit, branch or tag"
    )
    parser.add_argument("--data-cache-dir", required=True, metavar="DIR", help="where the dataset is written")
    parser.add_argument("--text-column", metavar="NAME", help="column of the text (default: text, content or code)")
    parser.add_argument("--id-column", metavar="NAME", help="column of the documents' ids (default: file and row)")
    parser.add_argument(
        "--metadata-columns", nargs="+", default=(), metavar="NAME", help="columns that are kept beside each document"
    )
    parser.add_argument(
        "--encoding", default="utf-8", metavar="NAME", help="of files without a byte order mark (default: utf-8)"
    )
    parser.add_argument(
        "--delimiter", metavar="CHAR", help="what separates the cells of CSV (default: a comma; a tab in .tsv)"
    )
    parser.add_argument(
        "--max-document-mb",
        type=int,
        default=128,
        metavar="N",
        help="reject rows, and files of source code, above N MiB (default: 128); a process takes several times N",
    )
    parser.add_argument("--format", metavar="KIND", help="csv, jsonl, parquet, text or source, if the name lies")
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="keep the first N ids of o200k_base (default: all; tiny uses 4096)"
    )
    parser.add_argument(
        "--validation-fraction", type=float, default=0.05, metavar="X", help="share of the documents that is held out"
    )
    parser.add_argument(
        "--compression", default="none", metavar="KIND", help="of the tokens on disk: none or zstd (a quarter of it)"
    )
    parser.add_argument(
        "--tokenizer-backend",
        default="tiktoken",
        metavar="NAME",
        help="tiktoken, or `fast`: fastokens or quicktok, checked against it (same tokens, several times the speed)",
    )
    parser.add_argument("--num-workers", type=int, metavar="N", help="processes (default: one for each CPU)")
    there = parser.add_mutually_exclusive_group()
    there.add_argument("--update", action="store_true", help="read what changed since; a new version of the dataset")
    there.add_argument("--append", action="store_true", help="add this source to the dataset; a new version of it")
    there.add_argument("--overwrite", action="store_true", help="replace another dataset in the folder")
    parser.add_argument("--address", help="running Ray cluster (default: RAY_ADDRESS, else a private local one)")


def run(args: argparse.Namespace) -> int:
    from blues.cluster.prepare import prepare
    from blues.data.reading.sources import plan
    from blues.data.tokenizer import Tokenizer
    from blues.errors import ConfigError

    if args.num_workers is not None and args.num_workers < 1:
        raise ConfigError(f"--num-workers must be at least 1, got {args.num_workers}")
    if args.max_document_mb < 1:
        raise ConfigError(f"--max-document-mb must be at least 1, got {args.max_document_mb}")
    tokenizer = Tokenizer.Config(vocab_size=args.vocab_size)
    screen = Screen()
    look = functools.partial(
        plan,
        args.input_dir if args.dataset is None else args.dataset,
        text_column=args.text_column,
        id_column=args.id_column,
        metadata_columns=args.metadata_columns,
        kind=args.format,
        encoding=args.encoding,
        delimiter=args.delimiter,
        max_document_bytes=args.max_document_mb << 20,
        commit=args.commit,
        report=screen.say,
    )
    with screen:
        prepared = prepare(
            look,
            args.data_cache_dir,
            tokenizer,
            validation_fraction=args.validation_fraction,
            compression=args.compression,
            mode="update" if args.update else "append" if args.append else "prepare",
            backend=args.tokenizer_backend,
            num_workers=args.num_workers,
            address=args.address,
            overwrite=args.overwrite,
            report=screen.show,
        )
    for reason in prepared.fell_back:
        screen.say(f"blues prepare: tiktoken did the work of the fast tokenizer: {reason}")
    print("\n".join(summary(prepared)))
    return 0


class Screen:
    """The live line, inside the `with` block (plain lines where there is no terminal)."""

    def __init__(self) -> None:
        self.interactive = sys.stderr.isatty()
        self.last = time.monotonic()

    def __enter__(self) -> Screen:
        self.line("looking through the source")
        return self

    def __exit__(self, *_) -> None:
        self.line("")

    def line(self, words: str) -> None:
        """Replace the live line, where there is one."""
        if self.interactive:
            sys.stderr.write(f"\r\x1b[2K{words}")
            sys.stderr.flush()

    def say(self, sentence: str) -> None:
        """A line that stays."""
        self.line("")
        print(sentence, file=sys.stderr)

    def show(self, state) -> None:
        from blues.cluster.prepare import count_bytes
        from blues.cluster.progress import count

        done = state.tasks_done == state.tasks
        line = (
            f"{count_bytes(state.bytes_done)} of {count_bytes(state.bytes)}  {count(state.documents)} documents  "
            f"{count(state.tokens)} tokens  {count_bytes(state.rate)}/s"
        )
        if self.interactive:
            started = done or state.tasks_done > state.resumed
            self.line(line if started else f"{count_bytes(state.bytes)} to read, starting")
        elif done or time.monotonic() - self.last >= PLAIN_LINE_S:
            self.last = time.monotonic()
            print(line, file=sys.stderr, flush=True)


def summary(prepared) -> list[str]:
    """What was made of what, in lines."""
    from blues.cluster.prepare import count_bytes

    store, planned, state = prepared.store, prepared.plan, prepared.progress
    manifest = store.manifest
    files = sum(source["files"] for source in manifest["sources"])
    lines = [f"{store.path}: {manifest['documents']:,} documents from {files:,} files"]
    for split, tree in manifest["splits"].items():
        lines.append(
            f"  {split:<11} {tree['documents']:>9,} documents  {tree['tokens']:>13,} tokens  "
            f"{count_bytes(tree['text_bytes']):>9} of text  {len(tree['chunks']):>5} chunks"
        )
    rejected = manifest["rejected"]
    if rejected:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in rejected.items())
        lines.append(f"  rejected    {sum(rejected.values()):>9,} rows: {reasons}; see {store.quarantine()}")
    if planned.ignored:
        kinds = sorted(planned.ignored.items(), key=lambda item: -item[1])
        passed = ", ".join(f"{count:,} {what}" for what, count in kinds[:MOST_LISTED])
        passed += f", {len(kinds) - MOST_LISTED} other kinds" if len(kinds) > MOST_LISTED else ""
        lines.append(f"  passed over {sum(planned.ignored.values()):>9,} files: {passed}")
    if not prepared.made:
        lines.append("  it was there already; nothing was done")
        return lines
    operation = manifest["operation"]
    if operation["kind"] != "prepare":
        read, kept, removed = (operation[f"files_{what}"] for what in ("read", "kept", "removed"))
        lines.append(f"  version {store.version}: {read:,} files read, {kept:,} unchanged, {removed:,} gone")
        if operation["all_again"]:
            lines.append("  all of them again: of so few documents, which is held out changes with the others")
    before = f", {state.resumed:,} of {state.tasks:,} parts from an earlier start" if state.resumed else ""
    backends = " and ".join(sorted(prepared.tokenizers))
    checked = f" ({prepared.rechecked:,} documents checked with tiktoken)" if prepared.rechecked else ""
    tokenized = f", tokenized by {backends}{checked}" if backends else ""
    lines.append(f"  {state.seconds:.1f} s, {count_bytes(state.rate)}/s from start to end{before}{tokenized}")
    return lines


if __name__ == "__main__":
    from blues.cli import run_job

    raise SystemExit(run_job("prepare"))
