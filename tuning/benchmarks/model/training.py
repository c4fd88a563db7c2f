"""One measured training run, in a process of its own (see `tuning.benchmarks.worker`).

In: a resolved experiment and a folder for the run, which is removed. Out: figures by name.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from blues import config as cfg
from blues.experiment import Experiment
from blues.training.observer import Event, Recorder
from tuning.benchmarks.worker import FORGET_PEAK, MB, Memory, ProcessorTime

if TYPE_CHECKING:
    from tuning.benchmarks.worker import Meter

WARM_UP = 0.1
"""Share of the steps that are not timed; at least two steps, as long as one is left."""


class Watch(Recorder):
    """Keeps the events, processor time at each step, and the peak of memory when the last was done: before validating
    and saving."""

    def __init__(self, steps: int, device: torch.device, clock: ProcessorTime) -> None:
        super().__init__()
        self.steps, self.device, self.clock, self.peak = steps, device, clock, 0
        self.cpu_s: list[float] = []

    def send(self, event: Event) -> None:
        super().send(event)
        if event.kind in ("start", "train"):
            self.cpu_s.append(self.clock.read())
        if event.kind == "train" and event.step == self.steps:
            self.peak = _peak(self.device)


def train(meter: type[Meter], tree: Mapping[str, Any], run_dir: str) -> dict[str, Any]:
    """Train and validate the experiment that `tree` is the dump of.

    `step ms` and `cpu ms` are medians over the steps after the warm-up: of the time that went by, and of the processor
    time that the process took, in which threads that wait for one another count too, so that a busy machine changes
    both. `peak MB` is how far memory rose from
    before the model was built to the end of the last step: of the device where there is one, else resident memory of
    the process, in which the code that the engine loads is the same for every variant.
    """
    experiment = cfg.load(Experiment, tree)
    training = experiment.training
    shutil.rmtree(run_dir, ignore_errors=True)
    data = {split: experiment.data.build(split=split) for split in ("train", "validation")}
    device: torch.device = training.parallel.build().device()
    start, watch = _start(device), Watch(training.steps, device, meter.clock)
    model = experiment.model.build(seed=training.seed)
    parameters, active = model.num_parameters(), model.num_active_parameters()
    with meter() as spent:
        training.build(
            model=model,
            train_data=data["train"],
            validation_data=data["validation"],
            run_dir=run_dir,
            tree=tree,
            observer=watch,
        ).run()
    shutil.rmtree(run_dir, ignore_errors=True)
    seconds = list(watch.metrics("throughput/step_seconds").values())
    cpu_s = [after - before for before, after in itertools.pairwise(watch.cpu_s)]
    first = min(max(2, round(WARM_UP * len(seconds))), len(seconds) - 1)
    return {
        "step ms": 1e3 * statistics.median(seconds[first:]),
        "cpu ms": 1e3 * statistics.median(cpu_s[first:]),
        "peak MB": (watch.peak - start) / MB,
        "validation loss": list(watch.metrics("validation/loss").values())[-1],
        "training loss": list(watch.metrics("train/cross_entropy").values())[-1],
        "parameters": parameters,
        "active parameters": active,
        "tokens": training.steps * training.global_batch_size * experiment.data.sequence_length,
        "run s": spent.seconds,
    }


def _start(device: torch.device) -> int:
    """What is in memory now, in bytes; peaks count from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    FORGET_PEAK.write_text("5")
    return Memory.read().resident


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else Memory.read().peak
