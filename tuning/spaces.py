"""Search spaces: finite sets of changes to an experiment, by dotted path.

In: an experiment to vary. Out: a `Space`, a tuple of changes such as `{"model.moe.router": "softmax_top_k"}`, each of
which `Experiment.override` understands. Spaces add (`a + b`: the points of both) and multiply (`a * b`: every pair).
A new named space is a new function here with `@space`; it takes the experiment, so that its values can lie around it.

The algebra follows google-deepmind/simply, `utils/sweep.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from blues.config import FAMILIES, nearest
from blues.errors import ConfigError
from blues.experiment import Experiment
from blues.model.rope import NoPE

Changes = Mapping[str, Any]


@dataclass(frozen=True)
class Space:
    """Points to try. Iterating gives the changes of each."""

    points: tuple[Changes, ...]

    def __add__(self, other: Space) -> Space:
        """The points of both, those of `self` first; equal points once."""
        return Space(self.points + tuple(point for point in other.points if point not in self.points))

    def __mul__(self, other: Space) -> Space:
        """Every pair of points.

        Raises:
            ConfigError: both change the same path.
        """
        twice = {path for point in self.points for path in point} & {path for point in other.points for path in point}
        if twice:
            raise ConfigError(f"{sorted(twice)[0]!r} is varied twice in one search space; vary it once")
        return Space(tuple({**left, **right} for left in self.points for right in other.points))

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self):
        return iter(self.points)

    def sample(self, count: int, seed: int = 0) -> Space:
        """At most `count` of the points, drawn without replacement, in their own order."""
        if count < 1:
            raise ConfigError(f"a search needs at least 1 trial, got {count}")
        chosen = sorted(random.Random(seed).sample(range(len(self)), min(count, len(self))))
        return Space(tuple(self.points[index] for index in chosen))


def choice(path: str, values: Iterable[Any]) -> Space:
    """One point for each value of one setting."""
    return Space(tuple({path: value} for value in values))


def product(*spaces: Space) -> Space:
    """Every combination of the points of these spaces; one point without changes for no space."""
    whole = Space(({},))
    for each in spaces:
        whole = whole * each
    return whole


def grid(values: Mapping[str, Iterable[Any]]) -> Space:
    """Every combination of the values of these settings."""
    return product(*(choice(path, options) for path, options in values.items()))


SPACES: dict[str, Callable[[Experiment], Space]] = {}
"""Every named space."""


def space(function: Callable[[Experiment], Space]) -> Callable[[Experiment], Space]:
    """Register a function under its own name."""
    SPACES[function.__name__] = function
    return function


def parse(words: str, experiment: Experiment) -> Space:
    """The space that a person wrote: names and `PATH=V1,V2` joined by `*`, e.g. `router*model.moe.top_k=1,2`.

    Raises:
        ConfigError: an unknown name (with the nearest), or a list of values that cannot be read.
    """
    return product(*(_factor(word.strip(), experiment) for word in words.split("*")))


def _factor(word: str, experiment: Experiment) -> Space:
    path, separator, values = word.partition("=")
    if not separator:
        if word not in SPACES:
            raise ConfigError(f"unknown search space {word!r}, and not PATH=VALUE,VALUE.{nearest(word, SPACES)}")
        return SPACES[word](experiment)
    try:
        listed = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError:
        listed = []
    if not listed:
        raise ConfigError(f"search space {word!r} must have the form PATH=VALUE,VALUE,...")
    return choice(path.strip(), listed)


def _mixture(experiment: Experiment, name: str) -> Any:
    if experiment.model.moe is None:
        raise ConfigError(f"the search space {name!r} varies the mixture of experts, and model.moe is null")
    return experiment.model.moe


@space
def router(experiment: Experiment) -> Space:
    """Every registered router, each with its own defaults."""
    _mixture(experiment, "router")
    return choice("model.moe.router", sorted(FAMILIES["router"].variants))


@space
def top_k(experiment: Experiment) -> Space:
    """One, two or four experts per token."""
    experts = _mixture(experiment, "top_k").num_experts
    return choice("model.moe.top_k", [k for k in (1, 2, 4) if k <= experts])


@space
def num_experts(experiment: Experiment) -> Space:
    """Half as many experts, as many, twice as many."""
    moe = _mixture(experiment, "num_experts")
    return choice("model.moe.num_experts", [n for n in _around(moe.num_experts, 2) if n >= moe.top_k])


@space
def load_balancing(experiment: Experiment) -> Space:
    """Without the balancing loss, and with a tenth, once and ten times its weight."""
    weight = _mixture(experiment, "load_balancing").load_balancing_weight or 0.01
    return choice("model.moe.load_balancing_weight", [0.0, *_around(weight, 10)])


@space
def load_balancing_scope(experiment: Experiment) -> Space:
    """Balanced over the tokens of a micro batch, of each sequence, of the global batch."""
    _mixture(experiment, "load_balancing_scope")
    return choice("model.moe.load_balancing_scope", ["micro_batch", "sequence", "global_batch"])


@space
def router_noise(experiment: Experiment) -> Space:
    """Every registered course of a router's noise over the training."""
    if not hasattr(_mixture(experiment, "router_noise").router, "schedule"):
        raise ConfigError("the search space 'router_noise' varies a router's noise, and model.moe.router has none")
    return choice("model.moe.router.schedule", sorted(FAMILIES["router_noise"].variants))


@space
def shared_experts(experiment: Experiment) -> Space:
    """Without shared experts, and with one of a routed one's width, plain and gated."""
    _mixture(experiment, "shared_experts")
    return choice("model.moe.shared_experts", [None, {"variant": "plain"}, {"variant": "gated"}])


@space
def null_experts(experiment: Experiment) -> Space:
    """Without null experts, and with a zero, a copy and a constant one at three values of tau."""
    _mixture(experiment, "null_experts")
    variants = [{"variant": "zero_copy_constant", "tau": tau} for tau in (0.25, 0.5, 0.75)]
    return choice("model.moe.null_experts", [None, *variants])


@space
def routing_rules(experiment: Experiment) -> Space:
    """Without rules, and each rule by itself (skip_light where there is a second expert to skip)."""
    names = ["capacity_by_position", "capacity_by_weight", "expert_dropout", "pair_dropout"]
    if _mixture(experiment, "routing_rules").top_k > 1:
        names.append("skip_light")
    return choice("model.moe.rules", [[], *([{"variant": name}] for name in names)])


@space
def depth(experiment: Experiment) -> Space:
    """All tokens through all blocks, and every registered choice of depth."""
    return choice("model.depth", [None, *({"variant": name} for name in sorted(FAMILIES["depth"].variants))])


@space
def conditional(experiment: Experiment) -> Space:
    """What computes less for some tokens: skipping light experts, null experts, choices of depth; and none of them."""
    points: list[dict[str, Any]] = [{}]
    if _mixture(experiment, "conditional").top_k > 1:
        points.append({"model.moe.rules": [{"variant": "skip_light", "in_training": True}]})
    points.append({"model.moe.null_experts": {"variant": "zero_copy_constant"}})
    points += [point for point in depth(experiment) if point["model.depth"] is not None]
    return Space(tuple(points))


PATTERN = "model.attention.pattern"


@space
def attention_pattern(experiment: Experiment) -> Space:
    """Every registered attention pattern, its numbers relative to the length of a sequence.

    Without those that are made from a trained model (block_list, entropy_window) or need trees (prefix_syntax).
    """
    length, heads = experiment.data.sequence_length, experiment.model.attention.num_heads
    quarter, sixteenth = max(1, length // 4), max(1, length // 16)
    window = {"variant": "sliding_window", "window": quarter}
    points: list[tuple[str, dict[str, Any]]] = [
        ("causal", {}),
        ("sliding_window", {"window": quarter}),
        ("sliding_window", {"window": quarter, "sinks": 4}),
        ("global_tokens", {"window": quarter, "tokens": 1, "every": sixteenth if sixteenth > 1 else 0}),
        ("dilated", {"segments": [sixteenth, quarter, length], "dilations": [1, 4, 16]}),
        ("strided", {"stride": sixteenth}),
        ("fixed", {"block": sixteenth, "summary": max(1, sixteenth // 8)}),
        ("block_sparse", {"block": sixteenth}),
        ("adaptive_window", {"window": length, "ramp": max(1, length // 32)}),
        ("all_of", {"patterns": [window, {"variant": "dilated", "segments": [length], "dilations": [2]}]}),
        ("any_of", {"patterns": [window, {"variant": "fixed", "block": sixteenth, "summary": 1}]}),
    ]
    if heads % 2 == 0:
        points.append(("by_head", {"patterns": [window, "causal"]}))
    if experiment.model.num_layers > 1:
        points.append(("by_layer", {"patterns": [window, "causal"]}))
    return _patterns(points) + local_global(experiment)


@space
def local_global(experiment: Experiment) -> Space:
    """All layers global, and 1, 3 or 5 local layers to a global one, with windows of an eighth and a quarter."""
    length, layers = experiment.data.sequence_length, experiment.model.num_layers
    windows = sorted({max(1, length // 8), max(1, length // 4)})
    mixed = [
        ("local_global", {"local_layers": local, "window": window})
        for local in (1, 3, 5)
        for window in windows
        if local < layers
    ]
    return _patterns([("causal", {}), *mixed])


def _patterns(points: Iterable[tuple[str, Mapping[str, Any]]]) -> Space:
    """Patterns with their own settings."""
    named = ({PATTERN: name, **{f"{PATTERN}.{key}": value for key, value in own.items()}} for name, own in points)
    return Space(tuple(named))


@space
def rope(experiment: Experiment) -> Space:
    """Every registered rotary embedding, with the experiment's base where it has one.

    Those that extend a context have a factor of 4, from a quarter of model.max_seq_len.
    """
    attention, path = experiment.model.attention, "model.attention.rope"
    theta = getattr(attention.rope, "theta", None)
    points: list[Changes] = []
    for name, member in sorted(FAMILIES["rope"].variants.items()):
        if name == "nope" and attention.rope_layers != "R":
            continue  # it would leave no layer to rotate
        keeps = theta is not None and getattr(member.Config(), "theta", None) is not None
        points.append({path: name, f"{path}.theta": theta} if keeps else {path: name})
    return Space(tuple(points))


@space
def rope_layers(experiment: Experiment) -> Space:
    """Rotation in every layer, in every other, and in three of four (RNoPE, arXiv 2501.18795)."""
    if experiment.model.attention.rope == NoPE.Config():
        raise ConfigError("the search space 'rope_layers' varies which layers rotate, and model.attention.rope is nope")
    return choice("model.attention.rope_layers", ["R", "RN", "RRRN"])


@space
def context_growth(experiment: Experiment) -> Space:
    """Whole sequences throughout, and quarters for the first half of the steps, then halves until three quarters."""
    length = experiment.data.sequence_length
    if length % 4:
        raise ConfigError(
            f"the search space 'context_growth' needs data.sequence_length in quarters, and it is {length}"
        )
    stages = [{"until": 0.5, "length": length // 4}, {"until": 0.75, "length": length // 2}]
    return choice("training.context", [[], stages])


@space
def packing(experiment: Experiment) -> Space:
    """Every registered way to cut a split into windows."""
    return choice("data.packing", sorted(FAMILIES["packing"].variants))


@space
def learning_rate(experiment: Experiment) -> Space:
    """A third of the learning rate, the rate itself, three times the rate."""
    return choice("training.optimizer.lr", _around(experiment.training.optimizer.lr, 3))


@space
def schedule(experiment: Experiment) -> Space:
    """Every registered learning-rate schedule, with the experiment's own warm-up."""
    warmup = experiment.training.schedule.warmup_steps
    return Space(
        tuple(
            {"training.schedule": name, "training.schedule.warmup_steps": warmup}
            for name in sorted(FAMILIES["schedule"].variants)
        )
    )


def _around(value: float, factor: int) -> list[Any]:
    """`value` divided by `factor`, itself, times `factor`; whole numbers stay whole."""
    below = value // factor if isinstance(value, int) else float(f"{value / factor:.3g}")
    return [below, value, value * factor]
