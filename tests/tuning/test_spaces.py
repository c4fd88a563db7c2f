"""Search spaces: their algebra has laws, and every named one gives experiments that can be built."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blues.config import FAMILIES
from blues.errors import ConfigError
from tuning.experiments import EXPERIMENTS, resolve
from tuning.spaces import SPACES, Space, choice, grid, parse, product
from tuning.sweep import plan

values = st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True)
spaces = st.builds(choice, st.sampled_from("abc"), values)


@settings(max_examples=30, deadline=None)
@given(values, values)
def test_a_product_holds_every_pair_once(left, right):
    points = (choice("x", left) * choice("y", right)).points
    assert sorted((point["x"], point["y"]) for point in points) == sorted((x, y) for x in left for y in right)
    assert grid({"x": left, "y": right}).points == points


@settings(max_examples=30, deadline=None)
@given(spaces, spaces, spaces)
def test_sums_are_associative_idempotent_and_distribute(a, b, c):
    assert (a + b) + c == a + (b + c)
    assert a + a == a
    other = choice("z", [1, 2])
    assert {frozenset(p.items()) for p in (a + b) * other} == {frozenset(p.items()) for p in (a * other) + (b * other)}


@settings(max_examples=30, deadline=None)
@given(spaces, st.integers(1, 6), st.integers(0, 5))
def test_a_sample_is_a_part_of_the_space_and_the_same_for_a_seed(space, count, seed):
    sample = space.sample(count, seed)
    assert len(sample) == min(count, len(space))
    assert [point for point in space if point in sample.points] == list(sample)
    assert sample == space.sample(count, seed)


def test_the_empty_product_changes_nothing_and_a_path_varies_once():
    assert product() == Space(({},))
    with pytest.raises(ConfigError, match="'x' is varied twice"):
        choice("x", [1]) * choice("x", [2])
    with pytest.raises(ConfigError, match="at least 1 trial, got 0"):
        choice("x", [1]).sample(0)


@pytest.mark.parametrize("experiment", sorted(EXPERIMENTS))
@pytest.mark.parametrize("name", sorted(SPACES))
def test_every_point_of_a_named_space_is_a_valid_experiment_and_all_differ(name, experiment):
    base = resolve(experiment)
    varied = [base.override(changes) for changes in parse(name, base)]
    assert len(varied) >= 2 and len(set(map(repr, varied))) == len(varied)


def test_the_router_space_knows_every_registered_router():
    points = parse("router", resolve("tiny")).points
    assert [point["model.moe.router"] for point in points] == sorted(FAMILIES["router"].variants)
    assert {"noisy_top_k", "softmax_top_k"} <= set(FAMILIES["router"].variants)


def test_the_space_of_patterns_knows_every_registered_one_that_needs_nothing_else():
    from_elsewhere = {"block_list", "entropy_window", "prefix_syntax"}
    points = parse("attention_pattern", resolve("blues01")).points
    assert {point["model.attention.pattern"] for point in points} == (
        set(FAMILIES["attention_pattern"].variants) - from_elsewhere
    )
    windows = {point.get("model.attention.pattern.window") for point in parse("local_global", resolve("tiny"))}
    assert windows == {None, 32, 64}


@pytest.mark.parametrize("name", ["attention_pattern", "local_global"])
def test_trials_of_patterns_have_names_that_a_folder_can_have(name):
    trials = plan(resolve("tiny"), parse(name, resolve("tiny")))
    assert len(trials) == len(parse(name, resolve("tiny"))) and max(len(trial.name) for trial in trials) <= 200


def test_the_rope_space_knows_every_registered_rope_and_keeps_the_base():
    base = resolve("tiny", ["model.attention.rope.theta=500.0"])
    varied = [base.override(point).model.attention.rope for point in parse("rope", base)]
    assert [rope._variant for rope in varied] == sorted(FAMILIES["rope"].variants)
    assert {rope.theta for rope in varied if getattr(rope, "theta", None)} == {500.0}
    in_part = resolve("tiny", ["model.attention.rope_layers=RN"])
    assert {point["model.attention.rope"] for point in parse("rope", in_part)} == {*FAMILIES["rope"].variants} - {
        "nope"
    }
    with pytest.raises(ConfigError, match="model.attention.rope is nope"):
        parse("rope_layers", resolve("tiny", ["model.attention.rope=nope"]))


def test_a_space_written_by_hand():
    points = parse("model.moe.top_k=1,2 * training.optimizer.lr=1e-3", resolve("tiny")).points
    assert [point["model.moe.top_k"] for point in points] == [1, 2]
    assert resolve("tiny").override(points[0]).training.optimizer.lr == 1e-3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("ruoter", "unknown search space 'ruoter'.*Did you mean 'router'"),
        ("model.moe.top_k=", "must have the form PATH=VALUE,VALUE"),
        ("model.moe.top_k=[", "must have the form PATH=VALUE,VALUE"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(words, resolve("tiny"))


def test_a_space_of_the_mixture_needs_a_mixture():
    with pytest.raises(ConfigError, match="model.moe is null"):
        parse("router", resolve("tiny", ["model.moe=null"]))
