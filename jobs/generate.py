"""Continue a prompt with a trained model, or measure how well it predicts a text.

The prompt and its continuation go to standard output as they are made; figures and notices go to standard error.
A prompt of `-` is read from standard input.

examples:
  blues generate --checkpoint runs/tiny --prompt "def main" --max-length 64 --temperature 0.8 --top-p 0.95
  blues generate --checkpoint runs/tiny --eval-text README.md
"""

from __future__ import annotations

import argparse
import sys

SAMPLING_FLAGS = ("max_length", "temperature", "top_p", "top_k", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="run folder, checkpoint folder, or folder of `blues export`"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="text to continue; - reads it from standard input")
    run = "(default: the run's own inference settings)"
    parser.add_argument("--max-length", type=int, metavar="N", help=f"new tokens at most {run}")
    parser.add_argument("--temperature", type=float, metavar="X", help=f"0 is greedy; higher is more varied {run}")
    parser.add_argument("--top-p", type=float, metavar="P", help=f"keep the likeliest tokens up to this mass {run}")
    parser.add_argument("--top-k", type=int, metavar="K", help=f"keep only so many tokens, 0 = off {run}")
    parser.add_argument("--seed", type=int, metavar="N", help=f"the same seed gives the same text {run}")
    parser.add_argument(
        "--eval-text",
        metavar="FILE_OR_TEXT",
        help="print perplexity and expert utilization on a text file, or on these words",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def run(args: argparse.Namespace) -> int:
    from blues.errors import ConfigError
    from blues.evaluation.suite import Evaluation, read_text
    from blues.inference.engine import load_model, stream_text

    if args.prompt is None and args.eval_text is None:
        raise ConfigError("nothing to do: give --prompt TEXT to continue, or --eval-text FILE_OR_TEXT to measure")
    evaluated = None if args.eval_text is None else read_text(args.eval_text)
    loaded = load_model(args.checkpoint, device=args.device)
    if args.prompt is not None:
        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
        chosen = {name: value for name in SAMPLING_FLAGS if (value := getattr(args, name)) is not None}
        stream = stream_text(loaded, prompt, **chosen)
        print(prompt, end="", flush=True)
        for piece in stream:
            print(piece, end="", flush=True)
        print(flush=True)
        print(stream.summary(), file=sys.stderr)
    if evaluated is not None:
        print(Evaluation.of(loaded).text(loaded, *evaluated).table())
    return 0


if __name__ == "__main__":
    from blues.cli import run_job

    raise SystemExit(run_job("generate"))
