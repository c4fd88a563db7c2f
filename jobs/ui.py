"""Show the recorded runs: open MLflow's pages over a directory until Ctrl-C.

A server that a training run already started over the directory is shared. With --run, metrics of those runs that
could not reach MLflow while they trained are sent first.

examples:
  blues ui
  blues ui --directory mlflow --port 5000
  blues ui --run runs/tiny
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--directory", default="mlflow", help="the local server's folder (tracking.directory of a run)")
    parser.add_argument(
        "--run",
        nargs="+",
        default=[],
        metavar="RUN_DIR",
        help="run folders to send first; they say where their server is",
    )
    parser.add_argument("--port", type=int, default=0, help="port of 127.0.0.1; 0 takes a free one")
    parser.add_argument("--browse", action="store_true", help="open the page in a web browser")


def run(args: argparse.Namespace) -> int:
    from blues.tracking.ui import serve

    serve(args.directory, runs=args.run, port=args.port, browse=args.browse)
    return 0


if __name__ == "__main__":
    from blues.cli import run_job

    raise SystemExit(run_job("ui"))
