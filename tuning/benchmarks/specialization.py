"""What measuring the experts costs: seconds of counting and of reading, beside those of the training step they watch.

In: a device and the shape of a model. Out: a `Cost`. Run as `python -m tuning.benchmarks.specialization`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from blues.tracking.metrics import ExpertStatistics
from blues.tracking.specialization import Labels, SpecializationCounts, copy_together


class Shape(NamedTuple):
    """Of a forward pass; the defaults are those of Blues-01. layers: mixtures."""

    tokens: int = 16_384
    layers: int = 6
    experts: int = 8
    top_k: int = 2
    vocabulary: int = 200_064
    domains: int = 8


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds. load: `ExpertStatistics.update`, every forward pass. counting: `SpecializationCounts.update`, every
    forward pass of a window. reading: all figures of a report, their copy to the host included. bytes: of the counts.
    """

    device: str
    shape: Shape
    load: float
    counting: float
    reading: float
    bytes: int


class Routed(NamedTuple):
    """The part of a `Routing` that is counted."""

    ids_TK: Tensor
    probs_TE: Tensor


def specialization_cost(device: torch.device | str, shape: Shape | None = None, repeats: int = 20) -> Cost:
    """Medians over `repeats`, with random routing and labels as frequent as those of language (Zipf)."""
    shape, device = shape or Shape(), torch.device(device)
    generator = torch.Generator(device).manual_seed(0)
    layers = range(shape.layers)
    routing = []
    for _ in layers:
        probs_TE = torch.rand(shape.tokens, shape.experts, generator=generator, device=device).softmax(-1)
        routing.append(Routed(probs_TE.topk(shape.top_k).indices, probs_TE))
    uniform_T = torch.rand(shape.tokens, generator=generator, device=device)
    zipf_T = (shape.vocabulary**uniform_T).long().clamp(max=shape.vocabulary - 1)
    domain_T = torch.randint(shape.domains, (shape.tokens,), generator=generator, device=device)
    labels = {"input_token": zipf_T, "target_token": zipf_T.roll(1), "domain": domain_T}
    kinds = [
        Labels("input_token", shape.vocabulary),
        Labels("target_token", shape.vocabulary),
        Labels("domain", shape.domains, tuple(map(str, range(shape.domains)))),
    ]
    sizes = [shape.experts] * shape.layers
    counts = SpecializationCounts(layers, sizes, kinds, device)
    load = ExpertStatistics(layers, sizes, device)
    counted_T = torch.ones(shape.tokens, dtype=torch.bool, device=device)
    return Cost(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        shape=shape,
        load=_seconds(lambda: load.update(routing), device, repeats),
        counting=_seconds(lambda: counts.update(routing, labels, counted_T), device, repeats),
        reading=_seconds(lambda: counts.figures(copy_together(counts.results())), device, max(3, repeats // 4)),
        bytes=counts.counts.numel() * counts.counts.element_size(),
    )


def _seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median, the device's work included."""
    times = []
    for number in range(repeats + 2):  # two to warm up
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        if number >= 2:
            times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, value in Shape()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = vars(parser.parse_args())
    device = arguments.pop("device")
    cost = specialization_cost(device, Shape(**arguments))
    print(json.dumps({**dataclasses.asdict(cost), "shape": cost.shape._asdict()}, indent=2))


if __name__ == "__main__":
    main()
