"""Measure a trained model: loss, perplexity and bits per byte per source, and what every expert did.

By default on the validation split of the dataset it was trained on. `--json` prints the same as JSON.

examples:
  blues evaluate --checkpoint runs/tiny
  blues evaluate --checkpoint runs/tiny --long-context positions retrieval tracking
  blues evaluate --checkpoint runs/tiny --data-cache-dir data/other --max-tokens 0 --json
  blues evaluate --checkpoint runs/tiny --text README.md --figure experts.png
"""

from __future__ import annotations

import argparse

CHANGES = ("split", "max_tokens", "context", "stride", "batch_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="run folder, checkpoint folder, or folder of `blues export`"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--data-cache-dir", metavar="DIR", help="prepared or merged dataset (default: the run's own)")
    what.add_argument("--text", metavar="FILE_OR_TEXT", help="a text file, or a literal text, instead of a dataset")
    run = "(default: the run's own evaluation settings)"
    parser.add_argument("--split", choices=("train", "validation"), help=f"split of the dataset {run}")
    parser.add_argument("--max-tokens", type=int, metavar="N", help=f"tokens scored per source, 0 = all {run}")
    parser.add_argument("--context", type=int, metavar="N", help=f"tokens seen at once, 0 = the model's limit {run}")
    parser.add_argument("--stride", type=int, metavar="N", help=f"tokens between windows, 0 = half a context {run}")
    parser.add_argument("--batch-size", type=int, metavar="N", help=f"windows per forward pass {run}")
    parser.add_argument("--figure", metavar="FILE.png", help="also draw the experts' load, layers x experts")
    parser.add_argument(
        "--long-context",
        nargs="+",
        metavar="NAME",
        help="instead, over sequences as long as the context (or --context): positions (perplexity by position), "
        "retrieval (multi-key), tracking (of variables)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def run(args: argparse.Namespace) -> int:
    import json

    from blues.data.merging.merge import open_dataset
    from blues.evaluation.long_context import measure
    from blues.evaluation.suite import Evaluation, read_text, recorded_dataset
    from blues.inference.engine import load_model

    loaded = load_model(args.checkpoint, device=args.device)
    if args.long_context:
        chosen = {"split": args.split or "validation", "length": args.context or 0, "batch_size": args.batch_size}
        results = measure(loaded, args.long_context, args.data_cache_dir, **chosen)
        trees = {name: result.to_tree() for name, result in results.items()}
        print(json.dumps(trees, indent=2) if args.json else "\n\n".join(result.table() for result in results.values()))
        return 0
    evaluation = Evaluation.of(loaded, **{name: getattr(args, name) for name in CHANGES})
    if args.text is not None:
        report = evaluation.text(loaded, *read_text(args.text))
    else:
        chosen = args.data_cache_dir
        report = evaluation.dataset(loaded, recorded_dataset(loaded) if chosen is None else open_dataset(chosen))
    print(json.dumps(report.to_tree(), indent=2, ensure_ascii=False) if args.json else report.table())
    if args.figure is not None:
        report.draw_experts(args.figure)
    return 0


if __name__ == "__main__":
    from blues.cli import run_job

    raise SystemExit(run_job("evaluate"))
