"""Attention: every backend of blues/kernels/attention/ at the shape of Blues-01, beside each other in one process.

In: a device and shapes. Out: times, rates, and how far each backend is from the naive one in float32, in a record.

Rounds, not one backend after the other: if the device slows down, it does so for all. `ms` is the device's time alone:
the device is kept busy until all calls of a round are queued, so that no launch is waited for. `host ms` is what a call
costs the host; where it is more than `ms`, as in decoding, the host sets the pace of a model that is not captured in a
graph. `growing ms` is decoding as a model does it: host and device together, every call over another number of keys.
`auto` is what a model runs: the choice, and the wrapper of a layer around it.

    blues benchmark attention --only decoding --repeat 5
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from blues.config import nearest
from blues.errors import ConfigError
from tuning.benchmarks.attention.measure import measure
from tuning.benchmarks.attention.shapes import SHAPES, Shape
from tuning.benchmarks.bench import Bench

GROUPS = ("causal", "window", "decoding")


def benchmark(bench: Bench, only: str | None = None, *, calls: int = 20, seed: int = 0) -> None:
    """Measure the groups named in `only`, joined by commas (None: all), on the CUDA device.

    Raises:
        ConfigError: there is no such group, or no such device.
    """
    shapes = shapes_of(only)
    if calls < 1:
        raise ConfigError(f"--calls must be at least 1, got {calls}")
    if not torch.cuda.is_available():
        raise ConfigError("attention is measured on a CUDA device, and torch finds none here; run it on one")
    try:
        measure(bench.record, shapes, device=torch.device("cuda"), repeat=bench.repeat, calls=calls, seed=seed)
    except KeyboardInterrupt:
        bench.record.interrupted = True
        bench.record.save()
        raise


def shapes_of(only: str | None) -> Sequence[Shape]:
    """The shapes of the groups named in `only`.

    Raises:
        ConfigError: there is no such group.
    """
    names = GROUPS if only is None else [name.strip() for name in only.split(",")]
    for name in names:
        if name not in GROUPS:
            raise ConfigError(f"unknown group {name!r} in --only.{nearest(name, GROUPS)}")
    return [shape for shape in SHAPES if shape.group in names]


__all__ = ["GROUPS", "SHAPES", "Shape", "benchmark", "measure", "shapes_of"]
