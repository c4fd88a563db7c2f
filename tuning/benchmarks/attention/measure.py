"""Times attention backends against each other, and checks that they agree.

In: shapes. Out: measurements in a `Record`, one group for each shape.
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blues.kernels.attention import BACKENDS, Sight, Situation, capability_of, choose, form_of, supports
from blues.model.attention.backends import Attend
from tuning.benchmarks.attention.shapes import Given, Shape
from tuning.benchmarks.record import Figure, Measurement, Record, ratio, versions

AGREES = 0.01
"""Relative length of the difference to the naive backend in float32 that a bfloat16 one may have."""
QUADRATIC = ("naive", "sdpa_math")
SCORES = 2**31
"""Scores (B H T S) beyond which the backends that keep them all are left out."""
WARM_UP = 3
ATTEMPTS = 4
"""How often calls are queued anew because the device began before the last one was; it is held up for twice as long."""
COMPILED = ("flex",)
"""Backends that are compiled anew for every number of keys, which takes seconds: not measured with growing keys."""
NOTES = {
    "naive": "all scores in memory",
    "sdpa_math": "all scores in memory",
    "sdpa": "torch chooses among its fused kernels",
    "sdpa_flash": "FlashAttention 2 in torch",
    "sdpa_cudnn": "cuDNN",
    "flex": "FlexAttention, compiled",
    "flash2": "the package flash-attn 2",
    "flash4": "the package flash-attn-4",
}
PACKAGES = ("torch", "triton", "flash-attn", "flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels")


class Milliseconds(NamedTuple):
    """Of one call: device, with nothing between the calls; host, to queue it."""

    device: float
    host: float


@dataclass
class Runner:
    """A backend at a shape. errors: relative, of the result and of the gradients, once it was compared."""

    measurement: Measurement
    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    errors: tuple[float, ...] = ()


def measure(
    record: Record,
    shapes: Sequence[Shape],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    repeat: int = 3,
    calls: int = 20,
    seed: int = 0,
) -> None:
    """Measure all backends at all shapes; one that fails or disagrees does not stop the others."""
    for shape in shapes:
        title = f"{shape.H} query heads on {shape.G} of {shape.C} channels, {str(dtype).removeprefix('torch.')}"
        record.groups[shape.name] = {"title": title, "accelerator": _accelerator(device), "load": os.getloadavg()}
        _measure(record, shape, Given.draw(shape, device, dtype, seed), repeat, calls)
        record.save()
        _free(device)


def _measure(record: Record, shape: Shape, given: Given, repeat: int, calls: int) -> None:
    agreeing = []
    for runner in _runners(shape, given):
        record.measurements.append(runner.measurement)
        if runner.measurement.problem is None:
            _compare(runner, given, shape)
        if runner.measurement.problem is None:
            agreeing.append(runner)
        _say(f"{shape.name}: {runner.measurement.name}: {runner.measurement.problem or 'agrees'}")
    lengths = itertools.count(1)
    for _ in range(repeat):
        for runner in agreeing:
            run = _run(runner, given, shape, calls)
            if "growing ms" in runner.measurement.metrics:
                run["growing ms"] = _growing(runner, given, lengths, calls)
            runner.measurement.runs.append(run)
        record.save()
    _conclude(record, shape, [runner.measurement for runner in agreeing])


def _runners(shape: Shape, given: Given) -> Iterator[Runner]:
    """What a model runs, then every backend; the measurement of one that cannot run has the reason."""
    columns: tuple[str, ...] = ("ms", "host ms", "growing ms", "TFLOP/s", "error")
    if shape.trains:
        columns = ("ms", "ms with gradient", "host ms with gradient", "TFLOP/s", "TFLOP/s with gradient")
        columns += ("error", "error of gradient")
    device, found = given.q_BTHC.device, versions(PACKAGES)
    situation = Situation(
        device.type,
        capability_of(device),
        given.q_BTHC.dtype,
        shape.C,
        shape.H,
        shape.G,
        form_of(shape.sight),
        training=shape.trains,
        cache=not shape.trains,
    )
    layer = Attend("auto", head_dim=shape.C, num_heads=shape.H, num_kv_heads=shape.G)
    note = "what a model runs: the choice, in the wrapper of a layer"
    name = f"auto ({choose('auto', situation)})"
    yield Runner(Measurement(shape.name, name, "blues", note, columns, versions=found), _bind(layer, shape))
    for name, backend in BACKENDS.items():
        side: Any = "reference" if name in QUADRATIC else "peer"
        own = tuple(column for column in columns if column != "growing ms" or name not in COMPILED)
        measurement = Measurement(shape.name, name, side, NOTES[name], own, versions=found)
        measurement.problem = supports(name, situation)
        if measurement.problem is None and name in QUADRATIC and shape.scores > SCORES:
            measurement.problem = f"would keep {shape.scores / 2**30:.0f} Gi scores in memory"
        measurement.skipped = measurement.problem is not None
        yield Runner(measurement, _bind(backend.attend, shape))


def _bind(attend: Callable[[Tensor, Tensor, Tensor, Sight], Tensor], shape: Shape) -> Callable[..., Tensor]:
    sight = shape.sight
    return lambda q_BTHC, k_BSGC, v_BSGC: attend(q_BTHC, k_BSGC, v_BSGC, sight)


def _compare(runner: Runner, given: Given, shape: Shape) -> None:
    """Compare with the reference; where a backend fails or disagrees, that is its measurement's problem."""
    try:
        with torch.set_grad_enabled(shape.trains):
            out_BTHC = runner.call(*given.inputs)
        made = [out_BTHC.detach()]
        if shape.trains:
            made += torch.autograd.grad(out_BTHC, given.inputs, given.dout_BTHC)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:  # what the kernels' packages raise
        runner.measurement.problem = f"{type(error).__name__}: {error}".splitlines()[0]
        _free(given.q_BTHC.device)
        return
    runner.errors = tuple(
        ((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(made, given.expected, strict=True)
    )
    if not all(error < AGREES for error in runner.errors):
        shown = ", ".join(f"{error:.4f}" for error in runner.errors)
        runner.measurement.problem = f"disagrees with the naive backend in float32: relative errors {shown}"


def _run(runner: Runner, given: Given, shape: Shape, calls: int) -> dict[str, Any]:
    device, flops = given.q_BTHC.device, shape.flops
    with torch.no_grad():
        forward = _milliseconds(lambda: runner.call(*given.inputs), device, calls)
    run = {
        "ms": forward.device,
        "host ms": forward.host,
        "TFLOP/s": flops / forward.device / 1e9,
        "error": runner.errors[0],
        "load": os.getloadavg(),
    }
    if not shape.trains:
        return run

    def step() -> None:
        torch.autograd.grad(runner.call(*given.inputs), given.inputs, given.dout_BTHC)

    both = _milliseconds(step, device, calls)
    return {
        **run,
        "ms with gradient": both.device,
        "host ms with gradient": both.host,
        "TFLOP/s with gradient": 3.5 * flops / both.device / 1e9,  # five products in the backward for the forward's two
        "error of gradient": max(runner.errors[1:]),
    }


def _growing(runner: Runner, given: Given, lengths: Iterator[int], calls: int) -> float:
    """Milliseconds of a call, host and device together, over numbers of keys that nobody has had before (as long as
    there are such): what a backend prepares for a shape counts."""
    k_BSGC, v_BSGC = given.k_BSGC, given.v_BSGC
    S, device = k_BSGC.shape[1], given.q_BTHC.device
    with torch.no_grad():
        _wait(device)
        began = time.perf_counter()
        for length in itertools.islice(lengths, calls):
            keys = 1 + length % S
            runner.call(given.q_BTHC, k_BSGC[:, :keys], v_BSGC[:, :keys])
        _wait(device)
    return 1e3 * (time.perf_counter() - began) / calls


def _milliseconds(call: Callable[[], object], device: torch.device, calls: int) -> Milliseconds:
    """Medians over `calls` on the device, the mean on the host."""
    for _ in range(WARM_UP):
        call()
    _wait(device)
    marks = [time.perf_counter()]
    for _ in range(calls):
        call()
        marks.append(time.perf_counter())
    host = 1e3 * (marks[-1] - marks[0]) / calls
    if device.type != "cuda":
        return Milliseconds(1e3 * statistics.median(b - a for a, b in itertools.pairwise(marks)), host)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    for attempt in range(1, ATTEMPTS + 1):
        torch.cuda.synchronize(device)
        torch.cuda._sleep(int(2**attempt * host * calls * _cycles(device)))
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        if not events[
            0
        ].query():  # all was queued before the device began; a backend that waits for it never gets there
            break
    torch.cuda.synchronize(device)
    return Milliseconds(statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)), host)


@functools.cache
def _cycles(device: torch.device) -> float:
    """Cycles of `torch.cuda._sleep` in a millisecond."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = 50_000_000
    torch.cuda._sleep(cycles)  # the first is slower
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize(device)
    return cycles / begin.elapsed_time(end)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _conclude(record: Record, shape: Shape, agreeing: Sequence[Measurement]) -> None:
    """How what a model runs compares with the fastest backend."""
    metric = "ms with gradient" if shape.trains else "ms"
    spreads = {measurement.name: spread for measurement in agreeing if (spread := measurement.spread(metric))}
    chosen = next((name for name in spreads if name.startswith("auto")), None)
    peers = [name for name in spreads if name != chosen]
    if chosen is not None and peers:
        fastest = min(peers, key=lambda name: spreads[name].mean)
        name = f"time of {chosen} for one of the fastest, {fastest} ({metric})"
        record.figures.append(Figure(shape.name, name, ratio(spreads[chosen], spreads[fastest]), "", at_most=1.05))


def _free(device: torch.device) -> None:
    """Give memory back that the next one needs in larger pieces."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _accelerator(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
