"""Variants of the model at equal tokens: time of a step, peak memory and validation loss, each beside the default.

In: an experiment (by default `tiny`), names of search spaces, a number of steps and of seeds. Out: a record, a table
and a figure, see `results` and `plot`.

Every run is the real `Trainer` in a fresh process, on Python source that every machine with Python has. A round is one
seed: the default and every variant of a group, one after the other, with the same data order and, where the shapes are
the same, the same first weights; so they are compared seed by seed. What was measured is kept in the work folder under
what decides it (configuration, code, data, machine), so that the same command goes on after an interruption.

    blues benchmark model --only router,rope --steps 60 --seeds 3
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blues
from blues import config as cfg
from blues.cluster.prepare import prepare
from blues.data.reading.sources import plan
from blues.data.reading.standard_library import write_code
from blues.data.storage.store import Store
from blues.errors import BluesError, ConfigError
from blues.experiment import Experiment
from tuning.benchmarks.bench import Bench, Call
from tuning.benchmarks.data.kept import Facts, clear, code_of, kept
from tuning.benchmarks.model.plot import draw
from tuning.benchmarks.model.results import METRICS, against_default, table
from tuning.benchmarks.model.subjects import Subject, groups_of, run_of, subjects_of
from tuning.benchmarks.record import Measurement, Spread, device, versions
from tuning.experiments import resolve

HERE = Path(__file__).parent
FOLDER = "model"
"""In the work folder: data, and what was measured."""
CODE_BYTES = 3_500_000
PACKAGES = ("torch", "deepspeed", "numpy")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a person chooses. size: name of an experiment, or its YAML file. seeds: how many, from `seed` on."""

    size: str = "tiny"
    steps: int = 60
    seeds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"--steps must be at least 1, got {self.steps}")
        if self.seeds < 1:
            raise ConfigError(f"--seeds must be at least 1, got {self.seeds}")


def benchmark(bench: Bench, options: Options, only: str | None = None, *, keep: bool = False) -> None:
    """Measure the groups named in `only`, joined by commas (None: every space that changes the model alone).

    keep: leave data and measurements in the work folder after a whole run too, for a run with more groups or seeds.

    Raises:
        ConfigError: there is no such experiment or group.
    """
    base = resolve(options.size)
    names = groups_of(only, base)
    folder = bench.work / FOLDER
    data = _data(bench, folder, base)
    code = code_of(Path(blues.__file__).parent) + code_of(HERE)
    given = {"code": code, "data": Store.open(data).fingerprint, "device": device(), "versions": versions(PACKAGES)}
    try:
        for name in names:
            _Group(bench, options, name, base, data, folder, given).measure()
    except KeyboardInterrupt:
        bench.record.interrupted = True
        raise
    finally:
        bench.record.save()
    if not keep:
        clear(folder)


@dataclass
class _Group:
    """A space that is being measured. given: all beside the configuration that decides a measurement."""

    bench: Bench
    options: Options
    name: str
    base: Experiment
    data: Path
    folder: Path
    given: dict[str, Any]

    def measure(self) -> None:
        options, training = self.options, self.base.training
        tokens = options.steps * training.global_batch_size * self.base.data.sequence_length
        title = f"{self.base.name}, {options.steps:,} steps, {tokens:,} tokens, seeds from {options.seed}"
        self.bench.begin(self.name, title, experiment=cfg.dump(self.base), steps=options.steps, tokens=tokens)
        found = subjects_of(self.name, self.base)
        made = [self._measurement(subject) for subject in found]
        runs, done = len(found) * options.seeds, 0
        began = time.monotonic()
        for seed in range(options.seed, options.seed + options.seeds):
            for subject, measurement in zip(found, made, strict=True):
                done += 1
                if measurement.problem is None:
                    self._run(subject, measurement, seed, f"{done} of {runs}")
            self._conclude(made)
        self.bench.say(f"{self.name}: {runs} runs in {time.monotonic() - began:.0f} s")

    def _measurement(self, subject: Subject) -> Measurement:
        measurement = Measurement(self.name, subject.name, "blues", json.dumps(dict(subject.changes)), METRICS)
        measurement.problem, measurement.skipped = subject.problem, subject.problem is not None
        measurement.versions = self.given["versions"]
        self.bench.record.measurements.append(measurement)
        if subject.problem is not None:
            self.bench.say(f"  {subject.name}: skipped: {subject.problem}")
        return measurement

    def _run(self, subject: Subject, measurement: Measurement, seed: int, place: str) -> None:
        experiment = run_of(subject, data=self.data, steps=self.options.steps, seed=seed)
        kept_at = self.folder / "finished" / f"{self._key(experiment)}.json"
        try:
            is_kept = kept_at.exists()
            run = json.loads(kept_at.read_bytes()) if is_kept else self._train(experiment, seed, kept_at)
        except (BluesError, OSError) as error:
            measurement.problem = str(error)
            self.bench.say(f"  {place}: {subject.name}, seed {seed}: FAILED: {error}")
        else:
            measurement.runs.append(run)
            shown = ", ".join(f"{metric} {_shown(metric, run[metric])}" for metric in METRICS)
            self.bench.say(f"  {place}: {subject.name}, seed {seed}: {shown}{' (kept)' if is_kept else ''}")
        self.bench.record.save()

    def _train(self, experiment: Experiment, seed: int, kept_at: Path) -> dict[str, Any]:
        load, began = os.getloadavg(), time.monotonic()
        arguments = {"tree": cfg.dump(experiment), "run_dir": str((self.folder / "run").absolute())}
        answer = self.bench.call(Call(str(HERE / "training.py"), "train", arguments))
        run = {"seed": seed, **answer, "load": load, "process_s": time.monotonic() - began}
        kept_at.parent.mkdir(parents=True, exist_ok=True)
        cfg.write_atomic(kept_at, json.dumps(run).encode())
        return run

    def _key(self, experiment: Experiment) -> str:
        """Of a measurement: everything that decides it. The group too, so that every group times its own default."""
        tree = cfg.dump(experiment)
        tree["data"].pop("path")  # the same data elsewhere is the same data
        decides = {"experiment": tree, "group": self.name, **self.given}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:24]

    def _conclude(self, made: list[Measurement]) -> None:
        self.bench.record.groups[self.name]["default"] = made[0].name
        self.bench.record.groups[self.name]["against default"] = {
            other.name: {metric: difference.tree() for metric, difference in differences.items()}
            for other, differences in against_default(made)
        }
        self.bench.record.save()


def _data(bench: Bench, folder: Path, base: Experiment) -> Path:
    """The standard library's code as a dataset for the experiment's tokenizer."""
    vocab_size = base.data.tokenizer.vocab_size
    target = folder / f"data-{vocab_size or 'whole'}"
    request = {"bytes": CODE_BYTES, "tokenizer": cfg.dump(base.data.tokenizer), "versions": versions(("tiktoken",))}

    def make(path: Path) -> Facts:
        written = write_code(folder / "code", max_bytes=CODE_BYTES)
        prepared = prepare(plan(written.path), path, base.data.tokenizer)
        return {"documents": written.documents, "bytes": written.size, "fingerprint": prepared.store.fingerprint}

    facts = kept(target, request, make, say=bench.say)
    bench.say(f"data: {facts['documents']:,} files of Python's own library, {facts['bytes'] / 1e6:.1f} MB")
    return target


def _shown(metric: str, value: float) -> str:
    return f"{value:.4f}" if "loss" in metric else str(Spread((value,)))


__all__ = ["Options", "benchmark", "draw", "table"]
