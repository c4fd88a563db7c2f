"""What long sequences cost: peak memory and time of a training step, the sequence read whole, in chunks, recomputed.

In: a device, a model, lengths. Out: a `Row` for each way and length. Run as
`python -m tuning.benchmarks.long_sequences`.

On a CPU the peak is that of tensors (`blues.training.memory`), counted in a run of its own, so that counting takes no
time from the figure beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from blues.model.attention.layer import Attention
from blues.model.moe.layer import MoE
from blues.model.transformer import Transformer
from blues.training.memory import peak_bytes

WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "checkpointed": {"gradient_checkpointing": True},
    "offloaded": {"activation_offload": True},
    "chunked": {"sequence_chunk": 0},
    "chunked and checkpointed": {"sequence_chunk": 0, "gradient_checkpointing": True},
}
"""Changes to the model; 0 stands for the chunk that was asked for. On a CPU, offloading moves nothing."""

SMALL = Transformer.Config(
    vocab_size=1024,
    dim=128,
    num_layers=4,
    ffn_dim=256,
    attention=Attention.Config(num_heads=12, num_kv_heads=1, head_dim=16),
    moe=MoE.Config(ffn_dim=128),
)
"""The proportions of Blues-01, small enough for a CPU."""


class Row(NamedTuple):
    """One way at one length. peak_bytes: beyond weights and gradients. seconds: of a step, median of the repeats."""

    way: str
    tokens: int
    peak_bytes: int
    seconds: float


def long_sequences(
    lengths: Sequence[int],
    *,
    model: Transformer.Config = SMALL,
    chunk: int = 256,
    device: torch.device | str = "cpu",
    repeats: int = 3,
    ways: Sequence[str] = tuple(WAYS),
) -> list[Row]:
    """A training step (forward and backward) on one row of each length, in each way."""
    device, rows = torch.device(device), []
    for way in ways:
        changes = {
            name: chunk if value == 0 and name == "sequence_chunk" else value for name, value in WAYS[way].items()
        }
        built = model.replace(max_seq_len=max(lengths), **changes).build(seed=0).to(device).train()
        for length in lengths:
            ids = torch.randint(model.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(0)).to(
                device
            )

            def step(built: Transformer = built, ids: torch.Tensor = ids) -> None:
                built.zero_grad(set_to_none=False)
                losses = built(ids[:, :-1], ids[:, 1:]).losses
                losses.total.backward()

            step()
            peak, times = peak_bytes(step, device), []
            for _ in range(repeats):
                began = time.perf_counter()
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append(time.perf_counter() - began)
            rows.append(Row(way, length, peak, statistics.median(times)))
    return rows


def table(rows: Sequence[Row]) -> str:
    """A line for each row."""
    lines = [f"{'way':<26}{'tokens':>8}{'peak MiB':>11}{'seconds':>9}"]
    lines += [f"{row.way:<26}{row.tokens:>8,}{row.peak_bytes / 2**20:>11.1f}{row.seconds:>9.2f}" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows = long_sequences(asked.lengths, chunk=asked.chunk, device=asked.device, repeats=asked.repeats)
    print(json.dumps([row._asdict() for row in rows], indent=2) if asked.json else table(rows))


if __name__ == "__main__":
    main()
