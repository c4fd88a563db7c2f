"""Extending a run to a longer context: a new run of the same weights, a little training, and figures before and after.

In: a checkpoint, a length, a method. Out: an ordinary run folder, whose step 0 is the checkpoint's weights with a fresh
optimizer; the training is the ordinary one from there, so Ctrl-C leaves it resumable and the same command resumes it.

    OUT/extension.json                     what was measured before and after
    OUT/figures/perplexity_by_position.png the same as curves
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blues import config as cfg
from blues.cluster import run_folder
from blues.cluster.train import TrainingResult, run_training
from blues.data.merging.merge import open_dataset
from blues.data.mixture.batches import Mixture
from blues.errors import CheckpointError, ConfigError
from blues.evaluation.perplexity import perplexity
from blues.evaluation.positions import PositionLosses, Positions
from blues.evaluation.retrieval import Retrieval, Task, Tracking
from blues.experiment import Experiment
from blues.inference.loading import LoadedModel, load_model
from blues.model.transformer import Transformer
from blues.table import align
from blues.tracking.context_plot import perplexity_by_position
from blues.training.checkpoint import Checkpoint, latest_checkpoint, read_checkpoint
from blues.training.extend import NONE, extended_model, write_start

FIGURE = "perplexity_by_position.png"
ORIGINAL, UNTRAINED, AFTER = "original", "untrained", "after"
Say = Callable[[str], None]
WARM_UP_SHARE = 10
"""The warm-up of the new training takes at most one of so many steps."""


@cfg.configclass
class Extension(cfg.Config):
    """length: tokens of the new context. method: see `blues.training.extend.METHODS`. steps: of training. lr: its peak
    learning rate, null for a tenth of the run's. samples: sequences, and puzzles of each length, that are measured.
    retrieval, tracking: the puzzles."""

    length: int
    method: str
    steps: int
    lr: float | None = None
    samples: int = 64
    retrieval: Retrieval.Config = Retrieval.Config()
    tracking: Tracking.Config = Tracking.Config()

    def __post_init__(self) -> None:
        for name in ("length", "steps", "samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.lr is not None and not self.lr > 0:
            raise ConfigError(f"--lr must be positive, got {self.lr}")


@dataclass(frozen=True)
class Extended:
    """What came of it. `measured`: the tree of extension.json."""

    training: TrainingResult
    measured: dict[str, Any]
    figure: Path | None

    def table(self) -> str:
        """The measurements side by side."""
        return table(self.measured)


def extend(
    checkpoint: str | Path,
    run_dir: str | Path | None,
    extension: Extension,
    *,
    data_path: str | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    address: str | None = None,
    fresh: bool = False,
    say: Say = print,
) -> Extended:
    """Make the run, or resume it.

    Args:
        run_dir: the new folder; None is runs/NAME-LENGTH-METHOD.
        data_path: a prepared dataset; None is the one that the checkpoint was trained on.
        overrides: `path.to.key=value` changes to the new run's experiment.
        device: of the measurements; the training goes where `training.parallel` says.

    Raises:
        ConfigError: what makes no sense: see `extended_experiment`.
        DataError: a dataset that cannot be used, or is too small for one sequence.
        CheckpointError: no checkpoint, or overrides that change the shapes.
    """
    source = read_checkpoint(checkpoint)
    experiment, original = extended_experiment(source, extension, data_path, overrides)
    run_dir = f"runs/{experiment.name}" if run_dir is None else run_dir
    target, given = Path(run_dir).resolve(), Path(checkpoint).resolve()
    if target in (given, *given.parents):
        raise ConfigError(f"--run-dir {str(run_dir)!r} is the run that is to be extended; give a new folder")
    with torch.device("meta"):
        source.check_shapes(experiment.model.build(), cfg.dump(experiment))
    data: Mixture = experiment.data.build(split="train")
    held = _held_out(experiment)
    if warning := short_documents(experiment.data.path, experiment.data.sequence_length):
        say(f"warning: {warning}")

    def begin(folder: Path) -> None:
        if latest_checkpoint(folder) is not None:
            _check_source(folder, source)
            return
        loaded = load_model(source.path, device=device)
        say(f"{experiment.name}: measuring {source.path} at {experiment.model.max_seq_len:,} tokens ...")
        _save(folder, _before(loaded, experiment, extension, held, original))
        write_start(
            folder,
            source,
            model=experiment.model,
            optimizer=experiment.training.optimizer,
            tree=cfg.dump(experiment),
            data_fingerprint=data.fingerprint_until(0),
        )

    with run_folder.hold(run_dir, experiment, fresh=fresh, check=begin) as folder:
        pass  # it is a run now, and the training takes it from here
    result = run_training(experiment, folder, address=address)
    measured, figure = _read(folder), folder / run_folder.FIGURES / FIGURE
    if result.interrupted:
        return Extended(result, measured, None)
    if AFTER not in measured["results"]:
        measured["results"][AFTER] = _measure(load_model(folder, device=device), extension, held)
        _save(folder, measured)
        _draw(measured, experiment, figure)
        _track(folder, experiment, measured, figure)
    return Extended(result, measured, figure)


def extended_experiment(
    source: Checkpoint, extension: Extension, data_path: str | None = None, overrides: Sequence[str] = ()
) -> tuple[Experiment, int]:
    """The experiment of the new run, and the length that the old one was trained at.

    An update keeps its tokens as far as whole sequences allow: sequences are longer, so there are fewer. The learning
    rate starts anew, a tenth of the old peak, which is about where most schedules end.

    Raises:
        ConfigError: a context that is not longer, a method that is unknown or does not fit, a wrong override.
        CheckpointError: a checkpoint that no whole experiment is recorded in.
    """
    try:
        old = cfg.load(Experiment, source.tree)
    except ConfigError as error:
        raise CheckpointError(f"{source.path} does not record an experiment that this Blues knows: {error}") from None
    original, length = old.data.sequence_length, extension.length
    model = extended_model(old.model, original=original, length=length, method=extension.method)
    training, phases = old.training, old.data.phases
    micro = max(1, training.micro_batch_size * original // length)
    at_once = micro * training.parallel.data_parallel_size
    new = old.replace(
        name=f"{old.name}-{length}-{extension.method}",
        model=model,
        data=old.data.replace(
            path=data_path or old.data.path,
            sequence_length=length,
            phases=() if data_path or not phases else (phases[-1].replace(start=0),),
        ),
        training=training.replace(
            steps=extension.steps,
            micro_batch_size=micro,
            global_batch_size=max(1, round(training.global_batch_size * original / length / at_once)) * at_once,
            context=(),
            optimizer=training.optimizer.replace(lr=extension.lr or training.optimizer.lr / 10),
            schedule=training.schedule.replace(
                warmup_steps=min(training.schedule.warmup_steps, extension.steps // WARM_UP_SHARE)
            ),
            validation_samples=-(-training.validation_samples * original // length),
        ),
    )
    return new.override(cfg.parse_overrides(overrides)), original


def short_documents(path: str, length: int) -> str | None:
    """A warning where training documents are too short to teach a context of `length` tokens; None if few are."""
    documents = short = tokens = short_tokens = 0
    for store in open_dataset(path).stores:
        lengths = np.diff(store.document_ends("train"), prepend=0)
        below = lengths < length
        documents, short = documents + len(lengths), short + int(below.sum())
        tokens, short_tokens = tokens + int(lengths.sum()), short_tokens + int(lengths[below].sum())
    if short_tokens <= tokens / 10:
        return None
    return (
        f"{100 * short / documents:.0f}% of the training documents, with {100 * short_tokens / tokens:.0f}% of the "
        f"tokens, are shorter than {length:,} tokens: what stands further back than their beginning teaches little"
    )


def reshaped(loaded: LoadedModel, config: Transformer.Config) -> LoadedModel:
    """The same weights, shared, in a model of another configuration."""
    with torch.device("meta"):
        model = config.build()
    model.load_state_dict(loaded.model.state_dict(), assign=True)
    return dataclasses.replace(loaded, model=model.eval().requires_grad_(False), config=config)


def table(measured: Mapping[str, Any]) -> str:
    """Perplexity by position, retrieval and tracking, one column for each model."""
    results: Mapping[str, Any] = measured["results"]
    titles = {ORIGINAL: "before", UNTRAINED: f"{measured['method']}, untrained", AFTER: "after"}
    names = [name for name in titles if name in results]
    found = {name: PositionLosses.from_tree(results[name]["positions"]) for name in names}
    edges = found[names[0]].edges
    rows = [["perplexity at", *(titles[name] for name in names)]]
    for number, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
        beyond = " *" if stop > measured["original_length"] else ""
        values = (perplexity(found[name].nats[number]) for name in names)
        rows.append([f"{start:,}-{stop:,}{beyond}", *(f"{value:,.2f}" for value in values)])
    for task in (Retrieval.name, Tracking.name):
        totals = {name: results[name][task]["totals"] for name in names}
        for length in totals[names[0]]:
            cells = [[f"{100 * value:.0f}%" for value in totals[name][length]] for name in names]
            rows.append([f"{task} in {int(length):,}", *(f"{at} ({low}-{high})" for at, low, high in cells)])
    chances = ", ".join(f"{100 * results[names[0]][task]['chance']:.0f}%" for task in (Retrieval.name, Tracking.name))
    return "\n".join(
        [
            *align(rows),
            f"* beyond the {measured['original_length']:,} tokens trained before. Answers chosen right with 95% "
            f"intervals; guessing: {chances}.",
        ]
    )


def _held_out(experiment: Experiment) -> Mixture:
    """Held-out sequences of the new length, in their plain order: no padding, one after the other."""
    config = experiment.data.replace(sequence_length=experiment.model.max_seq_len)
    data: Mixture = Mixture.Config(
        path=config.path,
        sequence_length=config.sequence_length,
        tokenizer=config.tokenizer,
        isolate_documents=config.isolate_documents,
    ).build(split="validation")
    return data


def _before(
    loaded: LoadedModel, experiment: Experiment, extension: Extension, held: Mixture, original: int
) -> dict[str, Any]:
    """The checkpoint as it is, read beyond its length, and with the new rotary embedding before any training."""
    old = loaded.config
    beyond = extended_model(old, original=original, length=experiment.model.max_seq_len, method=NONE)
    results = {ORIGINAL: _measure(reshaped(loaded, beyond), extension, held)}
    if experiment.model.attention.rope != beyond.attention.rope:
        results[UNTRAINED] = _measure(reshaped(loaded, experiment.model), extension, held)
    return {
        "checkpoint": str(loaded.path.resolve()),
        "method": extension.method,
        "rope": cfg.dump(experiment.model.attention.rope),
        "original_length": original,
        "length": experiment.model.max_seq_len,
        "steps": experiment.training.steps,
        "results": results,
    }


def _measure(loaded: LoadedModel, extension: Extension, held: Mixture) -> dict[str, Any]:
    """All three measurements of a model, as plain values."""
    positions: Positions = Positions.Config(samples=extension.samples).build()
    found = positions.run(loaded, held)
    results: dict[str, Any] = {"positions": found.to_tree()}
    metrics = found.metrics()
    for config in (extension.retrieval, extension.tracking):
        each = -(-extension.samples // config.depths)
        task: Task = config.replace(samples=each).build()
        report = task.run(loaded, held)
        totals = {str(n): [report.at(n).accuracy, *report.interval(n)] for n in report.lengths}
        results[task.name] = report.to_tree() | {"totals": totals}
        metrics |= report.metrics()
    return results | {"metrics": metrics}


def _draw(measured: Mapping[str, Any], experiment: Experiment, figure: Path) -> None:
    titles = {
        ORIGINAL: "before: the rotation it was trained with",
        UNTRAINED: f"before: {measured['method']} without training",
        AFTER: f"after {measured['steps']:,} steps at {measured['length']:,} tokens",
    }
    results = measured["results"]
    curves = {
        title: PositionLosses.from_tree(results[name]["positions"]) for name, title in titles.items() if name in results
    }
    figure.parent.mkdir(exist_ok=True)
    perplexity_by_position(
        curves,
        figure,
        trained_length=measured["original_length"],
        title=f"{experiment.name}: perplexity by position",
    )


def _track(folder: Path, experiment: Experiment, measured: Mapping[str, Any], figure: Path) -> None:
    """The measurements in the run's own tracker: those before at step 0, those after at the last."""
    with experiment.tracking.build(run_dir=folder, run_name=experiment.name) as tracker:
        for name, results in measured["results"].items():
            metrics = {f"extension/{name}/{key}": value for key, value in results["metrics"].items()}
            tracker.log_metrics(metrics, measured["steps"])
        for artifact in (figure, folder / run_folder.EXTENSION):
            tracker.log_artifact(artifact, folder=run_folder.FIGURES)


def _check_source(folder: Path, source: Checkpoint) -> None:
    """Raises ConfigError where the folder's run set out from another checkpoint."""
    begun = _read(folder)["checkpoint"]
    if begun != str(source.path.resolve()):
        raise ConfigError(
            f"{folder} extends {begun}, not {source.path}; give that --checkpoint to go on, another --run-dir, or "
            "--fresh to start over"
        )


def _save(folder: Path, measured: Mapping[str, Any]) -> None:
    cfg.write_atomic(folder / run_folder.EXTENSION, json.dumps(measured, indent=2).encode())


def _read(folder: Path) -> dict[str, Any]:
    """What `_save` wrote.

    Raises:
        CheckpointError: it is gone.
    """
    try:
        return json.loads((folder / run_folder.EXTENSION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / run_folder.EXTENSION} cannot be read ({error}); start over with --fresh or another --run-dir"
        ) from None
