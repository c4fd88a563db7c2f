"""Named experiments: Blues-01 is what its description says, and names, files and overrides resolve or explain."""

from __future__ import annotations

import pytest
import torch

from blues import config as cfg
from blues.errors import ConfigError
from tuning.experiments import EXPERIMENTS, resolve


def test_blues01_is_the_published_shape():
    model = resolve("blues01").model
    assert (model.dim, model.num_layers, model.vocab_size, model.tie_embeddings) == (768, 12, 200_064, True)
    attention, moe = model.attention, model.moe
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (12, 1, 64)
    assert attention.qk_norm
    assert moe is not None
    assert (moe.num_experts, moe.top_k, moe.every) == (8, 2, 2)
    assert moe.router._variant == "noisy_top_k" and moe.router.noise > 0
    assert moe.load_balancing_weight > 0 and moe.router_z_weight > 0
    with torch.device("meta"):
        built = model.build()
    assert built.embedding.weight.shape == (200_064, 768)


def test_tiny_fits_a_laptop_and_its_vocabularies_agree():
    tiny = resolve("tiny")
    assert tiny.data.tokenizer.vocab_size == tiny.model.vocab_size == 4096
    assert tiny.training.parallel.num_workers == 2
    assert tiny.model.build().num_parameters() < 5_000_000


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_an_experiment_survives_its_yaml_and_resolves_from_it(name, tmp_path):
    chosen = resolve(name)
    assert chosen.name == name
    cfg.save(chosen, tmp_path / "experiment.yaml")
    assert resolve(str(tmp_path / "experiment.yaml")) == resolve(str(tmp_path)) == chosen


def test_overrides_are_applied_on_top_of_a_name_or_a_file(tmp_path):
    changed = resolve("tiny", ["model.moe.router=softmax_top_k", "training.steps=7"])
    assert changed.model.moe.router._variant == "softmax_top_k" and changed.training.steps == 7
    cfg.save(changed, tmp_path / "mine.yml")
    assert resolve(str(tmp_path / "mine.yml"), ["training.steps=8"]).training.steps == 8


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("tinny", [], "unknown experiment 'tinny'.*Did you mean 'tiny'"),
        ("nowhere.yaml", [], "cannot read configuration 'nowhere.yaml'"),
        ("training.steps=7", [], "expected an experiment before the override 'training.steps=7'"),
        ("tiny", ["model.moe.topk=1"], "Did you mean 'top_k'"),
        ("tiny", ["data.sequence_length=512"], "longer than the model's context"),
        ("tiny", ["model.vocab_size=512"], "set both to the same number"),
    ],
)
def test_what_does_not_resolve_is_one_sentence(name, overrides, message):
    with pytest.raises(ConfigError, match=message):
        resolve(name, overrides)
