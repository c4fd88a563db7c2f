"""A pruning that can be written down, read and done again.

In: a model and what was measured on it, or a recipe file. Out: a smaller `Transformer`. A recipe holds all that its
action needs, so that no data are read when it is applied: the same weights give the same bits.

    statistics = calibrate(model, batches)
    recipe = Recipe(..., layers=plan_layers(model, statistics, criterion, action, budget))
    smaller = apply_recipe(model, recipe)
    save_recipe(recipe, "recipe.yaml"); read_recipe("recipe.yaml")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.attention.patterns import AttentionPattern
from blues.model.moe.layer import MoE, mixtures
from blues.model.moe.pruning.actions import Action, LayerPlan, Remove
from blues.model.moe.pruning.budget import Budget
from blues.model.moe.pruning.calibration import LayerStatistics, check_prunable
from blues.model.moe.pruning.criteria import Criterion, Reap, alive
from blues.model.moe.rules import SwitchOff
from blues.model.transformer import Transformer

VERSION = 1


@cfg.configclass
class Recipe(cfg.Config):
    """What was pruned and by what. checkpoint: the checksum of the weights it was made from; data_fingerprint, split,
    tokens, seed: of the calibration (empty, 0: there was none). attention: the sparser pattern, if attention was
    pruned too, with the share of attention it keeps."""

    version: int = VERSION
    checkpoint: str
    step: int = 0
    data_fingerprint: str = ""
    split: str = ""
    tokens: int = 0
    seed: int = 0
    criterion: Criterion.Config = Reap.Config()
    action: Action.Config = Remove.Config()
    budget: Budget | None = None
    layers: tuple[LayerPlan, ...] = ()
    attention: AttentionPattern.Config | None = None

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ConfigError(f"version: this Blues reads recipes of version {VERSION}, got {self.version}")
        numbers = [plan.layer for plan in self.layers]
        if numbers != sorted(set(numbers)):
            raise ConfigError(f"layers: their numbers must rise, got {numbers}")
        action = self.action._variant
        wants = {"targets": action in ("merge", "cluster"), "means": action == "mean_output"}
        for number, plan in enumerate(self.layers):
            for name, wanted in wants.items():
                if bool(plan.gone) and wanted and not getattr(plan, name):
                    raise ConfigError(f"layers[{number}].{name}: action {action} needs them")
                if getattr(plan, name) and not wanted:
                    raise ConfigError(f"layers[{number}].{name}: action {action} has none")
            if plan.targets and len(plan.shares) != len(plan.targets):
                raise ConfigError(f"layers[{number}].shares: one for each of {len(plan.targets)} experts is needed")


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe as YAML, whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    cfg.save(recipe, path)


def read_recipe(path: str | Path) -> Recipe:
    """
    Raises:
        ConfigError: unreadable, not YAML, an unknown key, or a value that cannot be (names the file and the key).
    """
    return cfg.read(Recipe, path)


def subset_sizes(model: Transformer, criterion: Criterion, budget: Budget | None) -> dict[int, int]:
    """For a criterion that measures subsets: their size in each layer; empty for others.

    Raises:
        ConfigError: too many subsets, or a budget that is only known afterwards.
    """
    if not criterion.needs_subsets or budget is None:
        return {}
    if budget.scope != "layer":
        raise ConfigError(
            f"criterion {criterion.config._variant}: compares subsets within a layer, so it cannot spend a budget over "
            "layers; use --scope layer"
        )
    layers = check_prunable(model)
    if any(moe.router.num_experts != moe.experts.num_experts for _, moe in layers):
        raise ConfigError(
            f"criterion {criterion.config._variant}: compares outputs of experts with weights only, and this model's "
            "routers know null experts too; use --criterion reap"
        )
    sizes = [moe.experts.num_experts for _, moe in layers]
    counts = budget.per_layer(sizes, [moe.config.top_k for _, moe in layers])
    for size, count in zip(sizes, counts, strict=True):
        criterion.check(size, count)
    return {layer: count for (layer, _), count in zip(layers, counts, strict=True)}


def plan_layers(
    model: Transformer,
    statistics: Sequence[LayerStatistics],
    criterion: Criterion,
    action: Action,
    budget: Budget | None,
) -> tuple[LayerPlan, ...]:
    """A plan for every mixture layer. `budget`: None for a criterion that sets it itself.

    Raises:
        ConfigError: the action cannot be done to this model, or the budget does not fit it.
    """
    layers = check_prunable(model)
    for _, moe in layers:
        action.check(moe)
    scores = [criterion.scores(each, moe).cpu() for each, (_, moe) in zip(statistics, layers, strict=True)]
    least = [moe.config.top_k for _, moe in layers]
    if budget is None or criterion.sets_budget:
        counts = [max(k, int((scores_E > 0).sum())) for scores_E, k in zip(scores, least, strict=True)]
    elif budget.scope == "global":
        counts = budget.over_layers(scores, least)
    else:
        counts = budget.per_layer([len(scores_E) for scores_E in scores], least)
    return tuple(
        action.plan(each, scores_E, criterion.keep(each, scores_E, count))
        for each, scores_E, count in zip(statistics, scores, counts, strict=True)
    )


def apply_recipe(model: Transformer, recipe: Recipe) -> Transformer:
    """The pruned model, in the mode of `model`, which stays as it is (tensors that did not change are shared).

    Raises:
        ConfigError: the recipe was made for layers of other sizes, or its action cannot be done to them.
    """
    pruned = model
    if recipe.layers:
        pruned = _prune_experts(model, recipe)
    if recipe.attention is not None:
        attention = pruned.config.attention.replace(pattern=recipe.attention)
        pruned = _built(pruned.config.replace(attention=attention), pruned.state_dict())
    return pruned.train(model.training)


def _prune_experts(model: Transformer, recipe: Recipe) -> Transformer:
    layers = check_prunable(model)
    _check_fits(recipe, [(layer, moe.experts.num_experts) for layer, moe in layers])
    action: Action = recipe.action.build()
    state: dict[str, Tensor] = dict(model.state_dict())
    for plan, (layer, moe) in zip(recipe.layers, layers, strict=True):
        action.check(moe)
        _check_switched_off(plan, moe, action)
        prefix = f"blocks.{layer}.feed_forward."
        own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        _check_width(plan, own)
        state |= {prefix + name: tensor for name, tensor in action.tensors(own, plan).items()}
    config = _without_schedule(_sized(model.config, [len(plan.kept) for plan in recipe.layers]), state)
    if action.redirect is not None and any(plan.gone for plan in recipe.layers):
        routed = tuple(plan.num_experts for plan in recipe.layers)
        assert config.moe is not None  # there are mixture layers
        config = config.replace(moe=config.moe.replace(redirect=action.redirect), routed_per_layer=routed)
    return _built(config, state)


def _sized(config: Transformer.Config, sizes: Sequence[int]) -> Transformer.Config:
    """Layers of one size are said as such: `blues export` takes them, and any tool that knows one number of experts."""
    assert config.moe is not None  # there are mixture layers
    if len(set(sizes)) > 1:
        return config.replace(experts_per_layer=tuple(sizes))
    return config.replace(experts_per_layer=None, moe=config.moe.replace(num_experts=sizes[0]))


def _check_switched_off(plan: LayerPlan, moe: MoE, action: Action) -> None:
    """Experts that are off must go, and by removal, or the pruned model would wake them."""
    off = [expert for expert, on in enumerate(alive(moe).tolist()) if not on]
    if off and (action.redirect is not None or set(off) & set(plan.kept)):
        raise ConfigError(
            f"layer {plan.layer}: dynamic pruning has switched expert {off[0]} off, and this pruning would wake it; "
            "use --dead, or --action remove with a budget that it does not fit into"
        )


def _without_schedule(config: Transformer.Config, state: dict[str, Tensor]) -> Transformer.Config:
    """What was to be switched off is gone: the rule goes too, or its schedule would begin anew. Changes `state`."""
    moe = config.moe
    if moe is None or not any(isinstance(rule, SwitchOff.Config) for rule in moe.rules):
        return config
    stays = [number for number, rule in enumerate(moe.rules) if not isinstance(rule, SwitchOff.Config)]
    for name in list(state):
        head, rules, tail = name.partition(".feed_forward.rules.")
        if name.endswith(".router.off_E") or rules:
            tensor = state.pop(name)
            number, _, rest = tail.partition(".")
            if rules and int(number) in stays:
                state[f"{head}{rules}{stays.index(int(number))}.{rest}"] = tensor
    return config.replace(moe=moe.replace(rules=tuple(moe.rules[number] for number in stays)))


def _check_fits(recipe: Recipe, sizes: Sequence[tuple[int, int]]) -> None:
    wanted = [(plan.layer, plan.num_experts) for plan in recipe.layers]
    if wanted == list(sizes):
        return
    listed = [", ".join(f"{layer}: {experts}" for layer, experts in both) for both in (wanted, sizes)]
    raise ConfigError(f"the recipe is for mixture layers (layer: experts) {listed[0]}; this model has {listed[1]}")


def _check_width(plan: LayerPlan, own: dict[str, Tensor]) -> None:
    width = own["experts.down_EDF"].shape[1]
    if plan.means and len(plan.means[0]) != width:
        raise ConfigError(f"layer {plan.layer}: the recipe's means have {len(plan.means[0])} numbers, width is {width}")


def _built(config: Transformer.Config, state: dict[str, Tensor]) -> Transformer:
    with torch.device("meta"):
        model: Transformer = config.build()
    for name, wanted in model.state_dict().items():
        found = state.get(name)
        if found is None or found.shape != wanted.shape:
            shape = "is missing" if found is None else f"has the shape {list(found.shape)}"
            raise ConfigError(
                f"pruning does not know how to make {name!r} fit fewer experts: it {shape}, and the pruned model wants "
                f"{list(wanted.shape)}"
            )
    model.load_state_dict(state, assign=True)
    return model


def describe(plans: Sequence[LayerPlan]) -> list[list[str]]:
    """Rows of a table: each layer's scores, an expert that goes in brackets."""
    widest = max(plan.num_experts for plan in plans)
    rows = [["layer", *(f"e{expert}" for expert in range(widest)), "kept"]]
    for plan in plans:
        cells = [f"{s:.4g}" if e in plan.kept else f"[{s:.4g}]" for e, s in enumerate(plan.scores)]
        padding = [""] * (widest - plan.num_experts)
        rows.append([str(plan.layer), *cells, *padding, f"{len(plan.kept)}/{plan.num_experts}"])
    return rows


def counts(model: Transformer, seq_len: int) -> dict[str, int]:
    """Parameters, active parameters, and training FLOPs a token (`Transformer.flops_per_token`)."""
    return {
        "parameters": model.num_parameters(),
        "active_parameters": model.num_active_parameters(),
        "experts": sum(moe.experts.num_experts for _, moe in mixtures(model)),
        "flops_per_token": model.flops_per_token(seq_len),
    }
