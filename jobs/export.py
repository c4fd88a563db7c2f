"""Write a checkpoint in the format of Hugging Face transformers, which every serving engine reads.

example:
  blues export --checkpoint runs/tiny --output exported/tiny
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="run folder or checkpoint folder")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make; must not hold anything yet")


def run(args: argparse.Namespace) -> int:
    from blues.inference.engine import load_model
    from blues.model.huggingface import export_huggingface

    loaded = load_model(args.checkpoint, device="cpu", precision="fp32")
    export_huggingface(loaded.model, loaded.tokenizer, args.output)
    print(f"""Exported step {loaded.step} of {str(args.checkpoint)!r} to {args.output!r}. Load it with

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained({args.output!r})
    tokenizer = AutoTokenizer.from_pretrained({args.output!r})""")
    return 0


if __name__ == "__main__":
    from blues.cli import run_job

    raise SystemExit(run_job("export"))
