"""Recipes: written, read, replayed; and what is wrong with them in one sentence."""

from __future__ import annotations

import pytest
import torch
import yaml

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.moe.pruning import Action, apply_recipe, read_recipe, save_recipe
from tests.model.examples import lively, small
from tests.model.moe.pruning.examples import model, recipe


@pytest.mark.parametrize("action", sorted(Action.variants))
def test_a_recipe_that_was_read_gives_the_same_bits(action, tmp_path):
    of, made = model(), recipe(model(), action=action)
    save_recipe(made, tmp_path / "deep" / "recipe.yaml")
    again = read_recipe(tmp_path / "deep" / "recipe.yaml")
    assert again == made
    for subject in (of, lively(small().build(), seed=9)):  # the same checkpoint, and another of the same shape
        first, second = (apply_recipe(subject, each).state_dict() for each in (made, again))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": 7}, "version 1"),
        ({"criterion": {"variant": "reep"}}, "Did you mean 'reap'"),
        ({"layerz": []}, "unknown key 'layerz'"),
        ({"layers.0.kept": [0, 9]}, r"layers\[0\]: kept: \[0, 9\] must be rising numbers from 0 to 3"),
        ({"layers.0.kept": []}, "at least one"),
        ({"layers.0.scores": [1.0]}, "1 for 4 experts"),
        ({"layers.0.targets": [0, 0, 0, 5]}, "places among"),
        ({"layers.0.means": [[1.0], [2.0]]}, "action remove has none"),
        ({"action": "merge"}, "action merge needs them"),
        ({"layers.1.layer": 1}, "must rise"),
    ],
)
def test_a_broken_recipe_is_refused_with_its_place(change, sentence, tmp_path):
    tree = cfg.dump(recipe(model()))
    for path, value in change.items():
        *parents, last = path.split(".")
        place = tree
        for key in parents:
            place = place[int(key) if key.isdigit() else key]
        place[last] = value
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_recipe(file)
    assert str(file) in str(caught.value)


def test_a_recipe_for_another_shape_is_refused():
    made = recipe(model())
    with pytest.raises(ConfigError, match=r"1: 4, 3: 4; this model has 1: 8, 3: 8"):
        apply_recipe(model(moe__num_experts=8), made)
    with pytest.raises(ConfigError, match="width"):
        apply_recipe(model(dim=16), recipe(model(), action="mean_output"))
    with pytest.raises(ConfigError, match="cannot read"):
        read_recipe("/nowhere/r.yaml")
