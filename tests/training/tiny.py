"""A real but tiny experiment: a dataset of standard-library source, a two-layer mixture of experts, a few steps.

`run_workers` starts several processes that join one gloo group, as a launcher would.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from blues.data.merging.merge import merge
from blues.data.mixture.batches import Mixture
from blues.data.storage.chunks import ChunkWriter
from blues.data.tokenizer import Tokenizer
from blues.experiment import Experiment
from blues.model.attention.layer import Attention
from blues.model.moe.layer import MoE
from blues.model.transformer import Transformer
from blues.tracking.tracker import Tracking
from blues.training.optim import AdamW, Cosine
from blues.training.parallel import Parallel
from blues.training.trainer import Trainer
from tests.data.datasets import publish

VOCAB = 320
TOKENIZER = Tokenizer.Config(vocab_size=VOCAB)


def make_store(directory: Path, modules: tuple[str, ...]) -> Path:
    """A dataset of these standard-library modules: each whole file is a document, the first 4 kB validation."""
    directory.mkdir(parents=True)
    tokenizer = TOKENIZER.build()
    folder = Path(os.__file__).parent
    writers = {split: ChunkWriter(directory, split, 0) for split in ("train", "validation")}
    for module in modules:
        text = (folder / f"{module}.py").read_text(encoding="utf-8")
        for split, part in (("validation", text[:4_000]), ("train", text[4_000:24_000])):
            tokens = np.array([*tokenizer.encode(part), tokenizer.eot_id], dtype=np.uint32)
            writers[split].add(tokens, id=module, source=module, text_bytes=len(part.encode()), metadata={})
    chunks = [writer.close() for writer in writers.values()]
    return publish(directory, chunks, TOKENIZER)


def make_dataset(directory: Path) -> Path:
    """Two sources merged 0.7 / 0.3."""
    first = make_store(directory / "first", ("argparse", "ast"))
    second = make_store(directory / "second", ("csv", "enum", "glob"))
    merge([first, second], weights=[0.7, 0.3], strategy="weighted", output=directory / "both")
    return directory / "both"


def experiment(data: Path, **training: Any) -> Experiment:
    """Overrides apply to the training section, by dotted path."""
    base = Experiment(
        name="tiny-test",
        data=Mixture.Config(path=str(data), sequence_length=32, tokenizer=TOKENIZER),
        model=Transformer.Config(
            vocab_size=VOCAB,
            dim=32,
            num_layers=2,
            max_seq_len=64,
            attention=Attention.Config(num_heads=2, num_kv_heads=1, head_dim=16),
            ffn_dim=48,
            moe=MoE.Config(num_experts=4, top_k=2, ffn_dim=32),
        ),
        training=Trainer.Config(
            steps=6,
            global_batch_size=8,
            micro_batch_size=2,
            optimizer=AdamW.Config(lr=3e-3),
            schedule=Cosine.Config(warmup_steps=2),
            parallel=Parallel.Config(device="cpu"),
            log_every=1,
            validate_every=3,
            validation_samples=10,
            checkpoint_every=3,
        ),
        tracking=Tracking.Config(enabled=False),
    )
    return base.override({f"training.{path}": value for path, value in training.items()})


def run_workers(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """`function(*args)` in `world_size` fresh processes of one gloo group; their results by rank."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        meeting = Path(tempfile.mkdtemp(prefix="blues-")) / "store"
        processes = [
            context.Process(target=_worker, args=(rank, world_size, str(meeting), results, function, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in hung:
            processes[rank].kill()
        shutil.rmtree(meeting.parent)
        failures = [text for kind, text in results.values() if kind == "error"]
        assert not failures, "\n".join(failures)
        assert not hung, f"workers {hung} still ran after {timeout} s"
        return [results[rank][1] for rank in range(world_size)]


def _worker(
    rank: int, world_size: int, file: str, results: Any, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(file, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        results[rank] = ("ok", function(*args))
        dist.destroy_process_group()
    except BaseException:
        results[rank] = ("error", traceback.format_exc())
        raise
