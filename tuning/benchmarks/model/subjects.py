"""What is measured: the points of a named search space, the default first.

In: an experiment and the name of a space of `tuning.spaces`. Out: `Subject`s, of which the first is the experiment as
it is, and the experiment that one run of each is made of.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blues.config import VARIANT_KEY, nearest
from blues.errors import ConfigError
from blues.experiment import Experiment
from tuning.spaces import SPACES

AS_IT_IS = "as it is"


@dataclass(frozen=True)
class Subject:
    """One variant. problem: why it cannot be built; then `experiment` is that without it."""

    name: str
    changes: Mapping[str, Any]
    experiment: Experiment
    problem: str | None = None


def groups_of(only: str | None, base: Experiment) -> list[str]:
    """The spaces named in `only`, joined by commas; None: every one that changes the model alone.

    Raises:
        ConfigError: there is no such space.
    """
    if only is None:
        return [name for name in SPACES if _of_the_model(name, base)]
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in SPACES:
            raise ConfigError(f"unknown group {name!r} in --only.{nearest(name, SPACES)}")
    return list(dict.fromkeys(names))


def subjects_of(group: str, base: Experiment) -> list[Subject]:
    """The points of a space, the one that changes nothing first (it is added where the space has none)."""
    default, others = Subject(AS_IT_IS, {}, base), []
    for changes in SPACES[group](base):
        try:
            subject = Subject(name_of(changes), changes, base.override(changes))
        except ConfigError as error:
            others.append(Subject(name_of(changes), changes, base, str(error)))
            continue
        if subject.experiment == base:
            default = subject
        elif all(subject.experiment != other.experiment for other in others):
            others.append(subject)
    return [default, *others]


def run_of(subject: Subject, *, data: Path, steps: int, seed: int) -> Experiment:
    """The run of a subject with a seed: one process, every step timed, validated at the end, no reports."""
    training = subject.experiment.training
    parallel = training.parallel
    cores = len(os.sched_getaffinity(0))
    return subject.experiment.override(
        {
            "data.path": str(data.absolute()),
            "data.seed": seed,
            "training.seed": seed,
            "training.steps": steps,
            "training.schedule.warmup_steps": min(training.schedule.warmup_steps, max(1, steps // 10)),
            "training.log_every": 1,
            "training.validate_every": 0,
            "training.checkpoint_every": 0,
            "training.specialization.window": 0,
            "training.specialization.probe_samples": 0,
            "training.parallel.num_workers": 1,
            "training.parallel.cpus_per_worker": min(cores, parallel.num_workers * parallel.cpus_per_worker),
        }
    )


def name_of(changes: Mapping[str, Any]) -> str:
    """A short name of a point: `sliding_window, window=64`; `none` for what is left out."""
    return ", ".join(_word(path.rpartition(".")[2], value) for path, value in changes.items()) or AS_IT_IS


def _word(key: str, value: Any) -> str:
    if value is None or value == [] or value == ():
        return "none"
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        own = {inner: each for inner, each in value.items() if inner != VARIANT_KEY}
        head = [str(value[VARIANT_KEY])] if VARIANT_KEY in value else []
        return " ".join([*head, *(f"{inner}={_inner(each)}" for inner, each in own.items())])
    if isinstance(value, Sequence) and all(isinstance(each, (str, Mapping)) for each in value):
        return " + ".join(_word(key, each) for each in value)
    return f"{key}={_inner(value)}"


def _inner(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")


def _of_the_model(name: str, base: Experiment) -> bool:
    try:
        points = SPACES[name](base)
    except ConfigError:  # such as one of the mixture for a model without
        return False
    return all(path.startswith("model.") for point in points for path in point)
