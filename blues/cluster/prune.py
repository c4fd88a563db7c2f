"""Pruning of a run: from its checkpoint to a smaller run, with the losses before, after, and after recovery training.

In: a checkpoint, a dataset, what to prune by. Out: an ordinary run folder. Its step 0 is the pruned model with a fresh
optimizer; recovery is the ordinary training from there, so the same command resumes it, and Ctrl-C leaves it resumable.

    OUTPUT/checkpoints/step-00000000/   the pruned model      OUTPUT/pruning/recipe.yaml    what was done, to repeat it
    OUTPUT/experiment.yaml              the smaller tree      OUTPUT/pruning/report.json    losses and sizes
                                                              OUTPUT/pruning/pruning.png    scores, who stayed, losses
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blues import config as cfg
from blues.cluster import run_folder
from blues.cluster.train import run_training
from blues.data.mixture.batches import Mixture
from blues.errors import CheckpointError, ConfigError
from blues.evaluation.held_out import batches, draw_samples, validation_loss
from blues.experiment import Experiment
from blues.inference.loading import LoadedModel, load_model
from blues.model.attention.pruning import measure_attention, prune_attention
from blues.model.moe.pruning import (
    Action,
    Budget,
    Criterion,
    LayerPlan,
    Recipe,
    apply_recipe,
    calibrate,
    plan_layers,
    read_recipe,
    save_recipe,
    subset_sizes,
)
from blues.model.moe.pruning.recipe import counts, describe
from blues.model.transformer import Transformer
from blues.table import align
from blues.tracking.pruning_plots import pruning_figure
from blues.training.checkpoint import MODEL, RECORD, latest_checkpoint, write_first_checkpoint

RECIPE, REPORT, FIGURE = "recipe.yaml", "report.json", "pruning.png"
Say = Callable[[str], None]


@cfg.configclass
class Pruning(cfg.Config):
    """What to prune and by what. criterion, action, budget: of the experts; budget null leaves them. tokens, split,
    seed: of the calibration. attention: share of the measured attention that stays, null to leave its blocks alone.
    block: tokens of such a block. recover_steps: of training afterwards; recover_lr: its peak learning rate, null for
    a tenth of the run's."""

    criterion: Criterion.Config
    action: Action.Config
    budget: Budget | None = None
    tokens: int = 65_536
    split: str = "train"
    seed: int = 0
    attention: float | None = None
    block: int = 64
    recover_steps: int = 0
    recover_lr: float | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"tokens: must be at least 1, got {self.tokens}")
        if self.split not in ("train", "validation"):
            raise ConfigError(f"split: must be train or validation, got {self.split!r}")
        if self.recover_steps < 0:
            raise ConfigError(f"recover_steps: must not be negative, got {self.recover_steps}")
        if self.recover_lr is not None and not self.recover_lr > 0:
            raise ConfigError(f"recover_lr: must be positive, got {self.recover_lr}")


def settings(
    *,
    criterion: str,
    action: str,
    keep: int | None,
    ratio: float | None,
    dead: bool,
    scope: str,
    attention: float | None,
    replay: str | None,
    **rest: Any,
) -> Pruning:
    """What a person asked for by words.

    Raises:
        ConfigError: unknown names (with the nearest), or a combination that means nothing.
    """
    if dead:
        criterion = "alive"
    elif criterion == "alive":
        raise ConfigError("--criterion alive: is what --dead chooses by; give --dead instead")
    budget = None
    if keep is not None or ratio is not None:
        budget = {"keep": keep, "ratio": ratio, "scope": scope}
    elif not dead and attention is None and replay is None:
        raise ConfigError("nothing to prune: give --keep, --ratio, --dead, --attention or --replay")
    if replay is not None and attention is not None:
        raise ConfigError("--attention: a recipe says what becomes of attention; leave it out beside --replay")
    tree = {"criterion": criterion, "action": action, "budget": budget, "attention": attention, **rest}
    return cfg.load(Pruning, tree)


@dataclass
class PruningReport:
    """Losses in nats per token by name (before, after, recovered), sizes before and after."""

    losses: dict[str, float]
    sizes: dict[str, dict[str, int]]
    recipe: Recipe
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Tables for a terminal."""
        lines = align(describe(self.recipe.layers)) if self.recipe.layers else []
        first = self.losses["before"]
        rows = [["validation loss", "nats/token", "change"]]
        rows += [[name, f"{loss:.4f}", f"{loss - first:+.4f}"] for name, loss in self.losses.items()]
        sizes = [["", "before", "after", "left"]]
        before, after = self.sizes["before"], self.sizes["after"]
        sizes += [
            [
                name.replace("_", " "),
                f"{before[name]:,}",
                f"{after[name]:,}",
                f"{after[name] / max(1, before[name]):.1%}",
            ]
            for name in before
        ]
        return [*lines, *self.notes, "", *align(rows), "", *align(sizes)]


def prune_run(
    checkpoint: str | Path,
    pruning: Pruning,
    output: str | Path,
    *,
    data_path: str | None = None,
    recipe_path: str | Path | None = None,
    replay: str | Path | None = None,
    fresh: bool = False,
    address: str | None = None,
    device: str = "auto",
    say: Say = print,
) -> PruningReport:
    """Prune, write the smaller run, train it for `pruning.recover_steps`. The same call again resumes.

    Args:
        recipe_path: where the recipe is written too. replay: a recipe to apply instead of measuring.

    Raises:
        CheckpointError, ConfigError, DataError: what cannot be read, or does not fit together.
    """
    loaded = load_model(checkpoint, device=device, precision="fp32")
    experiment = _experiment_of(loaded, data_path)
    held_out: Mixture = experiment.data.build(split="validation")
    output = Path(output)
    if output.resolve() in (loaded.path.resolve(), *loaded.path.resolve().parents):
        raise ConfigError(f"--output {str(output)!r} is the run that is to be pruned; give a new folder")
    source = _checksum(loaded)
    recipe = read_recipe(replay) if replay is not None else _known(output, pruning, source, fresh)
    if recipe is None:
        recipe = _measure(loaded, experiment, pruning, source)
    pruned = apply_recipe(loaded.model, recipe)
    smaller = _smaller(experiment, pruned, pruning)
    losses, notes = _losses(loaded.model, pruned, recipe, experiment, held_out)
    length = experiment.data.sequence_length
    report = PruningReport(
        losses, {"before": counts(loaded.model, length), "after": counts(pruned, length)}, recipe, notes=notes
    )
    with run_folder.hold(output, smaller, fresh=fresh) as folder:
        (folder / run_folder.PRUNING).mkdir(exist_ok=True)
        save_recipe(recipe, folder / run_folder.PRUNING / RECIPE)
        if latest_checkpoint(folder) is None:
            _write_start(folder, smaller, pruned)
        _write_report(folder, report, smaller.name)
    if recipe_path is not None:
        save_recipe(recipe, recipe_path)
    for line in report.lines():
        say(line)
    if pruning.recover_steps:
        del loaded, pruned  # the workers load it again
        result = run_training(smaller, output, address=address)
        report.interrupted = result.interrupted
        if result.finished and "validation/loss" in result.metrics:
            report.losses["recovered"] = result.metrics["validation/loss"]
            _write_report(Path(output), report, smaller.name)
            say(f"validation loss after {pruning.recover_steps:,} steps of recovery: {report.losses['recovered']:.4f}")
    say(f"pruned run: {output}; recipe: {Path(output) / run_folder.PRUNING / RECIPE}")
    return report


def _experiment_of(loaded: LoadedModel, data_path: str | None) -> Experiment:
    if not loaded.tree:
        raise CheckpointError(f"{str(loaded.path)!r} is an export without its experiment; give a run folder")
    experiment = cfg.load(Experiment, loaded.tree)
    return experiment.override({"data.path": data_path}) if data_path else experiment


def _checksum(loaded: LoadedModel) -> str:
    """Of the weights, as the checkpoint recorded it."""
    record = json.loads((loaded.path / RECORD).read_text(encoding="utf-8"))
    return str(record["files"][MODEL]["xxh3"])


def _known(output: Path, pruning: Pruning, source: str, fresh: bool) -> Recipe | None:
    """The recipe of an earlier start of the same pruning.

    Raises:
        ConfigError: `output` holds another one.
    """
    path = output / run_folder.PRUNING / RECIPE
    if fresh or not path.exists():
        return None
    recipe = read_recipe(path)
    there = (recipe.checkpoint, recipe.criterion, recipe.action, recipe.budget)
    here = (source, pruning.criterion, pruning.action, pruning.budget)
    calibration = (recipe.seed, recipe.split) != (pruning.seed, pruning.split) and recipe.tokens > 0
    if there != here or calibration or (recipe.attention is None) != (pruning.attention is None):
        raise ConfigError(
            f"{output} holds another pruning (criterion {recipe.criterion._variant}, action {recipe.action._variant}); "
            "give another --output, or --fresh to delete it and start over"
        )
    return recipe


def _measure(loaded: LoadedModel, experiment: Experiment, pruning: Pruning, source: str) -> Recipe:
    """Calibrate, and write down what follows from it."""
    model = loaded.model
    criterion: Criterion = pruning.criterion.build()
    action: Action = pruning.action.build()
    data: Mixture = experiment.data.build(split=pruning.split)
    size = experiment.training.micro_batch_size
    samples = draw_samples(data, pruning.tokens, pruning.seed)
    layers: tuple[LayerPlan, ...] = ()
    tokens = 0
    if pruning.budget is not None or criterion.sets_budget:
        sizes = subset_sizes(model, criterion, pruning.budget)
        statistics = calibrate(model, batches(data, samples, size), subset_sizes=sizes)
        layers, tokens = plan_layers(model, statistics, criterion, action, pruning.budget), statistics[0].tokens
    recipe = Recipe(
        checkpoint=source,
        step=loaded.step or 0,
        data_fingerprint=data.fingerprint,
        split=pruning.split,
        tokens=tokens,
        seed=pruning.seed,
        criterion=pruning.criterion,
        action=pruning.action,
        budget=pruning.budget,
        layers=layers,
    )
    if pruning.attention is None:
        return recipe
    smaller = apply_recipe(model, recipe)  # its attention is what will run
    rows = (batch.inputs.to(loaded.device) for batch in batches(data, samples, size))
    mass = measure_attention(smaller, rows, block=pruning.block)
    return recipe.replace(attention=prune_attention(smaller, mass, keep=pruning.attention).pattern)


def _smaller(experiment: Experiment, pruned: Transformer, pruning: Pruning) -> Experiment:
    """The tree of the pruned run: the run's own, with the smaller model, and recovery at a small rate."""
    training, schedule = experiment.training, experiment.training.schedule
    steps = pruning.recover_steps or training.steps
    rate = pruning.recover_lr or training.optimizer.lr / 10
    return experiment.replace(
        name=f"{experiment.name}-pruned",
        model=pruned.config,
        training=training.replace(
            steps=steps,
            optimizer=training.optimizer.replace(lr=rate),
            schedule=schedule.replace(warmup_steps=min(schedule.warmup_steps, steps // 10)),
        ),
    )


def _losses(
    model: Transformer, pruned: Transformer, recipe: Recipe, experiment: Experiment, held_out: Mixture
) -> tuple[dict[str, float], list[str]]:
    training = experiment.training
    measured: dict[str, Any] = {"samples": training.validation_samples or 256, "batch_size": training.micro_batch_size}
    losses = {"before": validation_loss(model, held_out, **measured)}
    notes = []
    losses["after"] = validation_loss(pruned, held_out, **measured)
    if recipe.attention is not None:
        if recipe.layers:
            without = apply_recipe(model, recipe.replace(attention=None))
            dense = validation_loss(without, held_out, **measured)
        else:
            dense = losses["before"]
        notes.append(f"the sparser attention alone costs {losses['after'] - dense:+.4f} nats per token")
    return losses, notes


def _write_start(folder: Path, experiment: Experiment, pruned: Transformer) -> None:
    """Step 0 of the pruned run: its weights, and an optimizer that has seen nothing."""
    data: Mixture = experiment.data.build(split="train")
    write_first_checkpoint(
        folder,
        model_state={name: tensor.cpu().contiguous() for name, tensor in pruned.state_dict().items()},
        shapes={name: parameter.shape for name, parameter in pruned.named_parameters()},
        state_names=experiment.training.optimizer.build().state_names,
        data_fingerprint=data.fingerprint_until(0),
        tree=cfg.dump(experiment),
        details={"pruned": True},
    )


def _write_report(folder: Path, report: PruningReport, name: str) -> None:
    tree = {"losses": report.losses, "sizes": report.sizes, "notes": report.notes}
    cfg.write_atomic(folder / run_folder.PRUNING / REPORT, json.dumps(tree, indent=2).encode())
    plans = report.recipe.layers
    pruning_figure(
        [plan.layer for plan in plans],
        [plan.scores for plan in plans],
        [plan.kept for plan in plans],
        report.losses,
        folder / run_folder.PRUNING / FIGURE,
        title=f"Pruning: {name}",
        criterion=str(report.recipe.criterion._variant),
    )
