"""Rotary embeddings of a longer context: settings that follow from the lengths, and weights that stay."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from blues import config as cfg
from blues.errors import CheckpointError, ConfigError
from blues.experiment import Experiment
from blues.model.rope import NTKAware, PRoPE, Resonance, YaRN, smallest_base
from blues.model.transformer import Transformer
from blues.training.checkpoint import read_checkpoint, step_folder, write_checkpoint
from blues.training.extend import METHODS, NONE, extended_model, settled, write_start
from tests.training.test_trainer import assert_identical, train
from tests.training.tiny import experiment, make_dataset

MODEL = Transformer.Config(vocab_size=320, dim=32, num_layers=2, max_seq_len=64, ffn_dim=48).override(
    {"attention.num_heads": 2, "attention.num_kv_heads": 1, "attention.head_dim": 32, "moe": None}
)
LENGTHS = {"original": 64, "length": 256}


def roped(rope, **changes) -> Transformer.Config:
    return MODEL.override({"attention.rope": rope, **changes})


def frequencies(model: Transformer.Config, length: int) -> torch.Tensor:
    rope = model.attention.rope.build(head_dim=model.attention.head_dim, max_seq_len=model.max_seq_len)
    return rope.frequencies(torch.device("cpu"), length)


def test_every_method_has_settings_that_build_and_slow_the_slowest_pair():
    before = frequencies(MODEL, 64)
    for method in METHODS:
        model = extended_model(MODEL, **LENGTHS, method=method)
        assert model.max_seq_len == 256 and model.attention.rope._variant == method
        assert frequencies(model, 256)[-1] < before[-1], method
        assert model.replace(max_seq_len=64, attention=MODEL.attention) == MODEL
        model.build()


def test_the_factor_is_the_quotient_of_the_lengths_and_other_settings_follow():
    ropes = {method: extended_model(MODEL, **LENGTHS, method=method).attention.rope for method in METHODS}
    assert ropes["yarn"] == YaRN.Config(factor=4.0, original_length=64)
    assert ropes["ntk"] == NTKAware.Config(factor=4.0)
    assert ropes["dynamic_ntk"].factor == 1.0 and ropes["dynamic_ntk"].original_length == 64
    assert ropes["base_change"].theta == 160_000 and ropes["base_change"].theta >= smallest_base(256)
    assert ropes["resonance"] == Resonance.Config(of=ropes["yarn"], original_length=64)
    turning = PRoPE(ropes["p_rope"], head_dim=32).turning
    wavelengths = 2 * math.pi / frequencies(MODEL, 64)
    assert turning == int((wavelengths <= 64).sum()) == 5


@pytest.mark.filterwarnings("ignore:attention.rope.theta")
@pytest.mark.parametrize("rope", [{"variant": "base_change"}, "yarn", "resonance", "longrope", "dynamic_ntk"])
def test_none_turns_as_before_whatever_followed_from_the_old_length(rope):
    model = roped(rope, max_seq_len=4096)
    longer = extended_model(model, original=4096, length=16384, method=NONE)
    for length in (100, 4096):
        assert torch.equal(frequencies(longer, length), frequencies(model, length))
    assert settled(longer.attention.rope, 32, 16384) == longer.attention.rope


def test_what_was_extended_is_extended_further():
    once = extended_model(MODEL, **LENGTHS, method="yarn")
    twice = extended_model(once, original=256, length=1024, method="yarn")
    assert twice.attention.rope == YaRN.Config(factor=16.0, original_length=64)
    resonant = extended_model(MODEL, **LENGTHS, method="resonance")
    again = extended_model(resonant, original=256, length=1024, method="resonance").attention.rope
    assert again == Resonance.Config(of=twice.attention.rope, original_length=64)
    dynamic = extended_model(MODEL, **LENGTHS, method="dynamic_ntk")
    assert extended_model(dynamic, original=256, length=512, method="dynamic_ntk").max_seq_len == 512
    changed = extended_model(MODEL, **LENGTHS, method="base_change")
    assert extended_model(changed, original=256, length=512, method="yarn").attention.rope.theta == 160_000


@pytest.mark.parametrize(
    ("model", "length", "method", "words"),
    [
        (MODEL, 64, "yarn", "is no extension: the model was trained on sequences of 64 tokens"),
        (MODEL, 256, "yarrn", "unknown method 'yarrn'. Did you mean 'yarn'"),
        (roped("linear"), 256, "yarn", "rotates by linear, which yarn cannot build upon; use --method none or linear"),
        (roped("p_rope"), 256, "yarn", "rotates by p_rope, which yarn cannot build upon; use --method none$"),
        (roped("nope"), 256, "yarn", "does not rotate"),
    ],
)
def test_what_makes_no_sense_is_refused(model, length, method, words):
    with pytest.raises(ConfigError, match=words):
        extended_model(model, original=64, length=length, method=method)


def test_a_run_that_starts_from_written_weights_equals_one_that_draws_the_same(tmp_path):
    exp = experiment(make_dataset(tmp_path / "data"))
    fingerprint = exp.data.build().fingerprint_until(0)
    initial = exp.model.build(seed=exp.training.seed).state_dict()
    source = write_checkpoint(
        tmp_path / "source",
        step=9,
        tokens=900,
        data_fingerprint="",
        tree=cfg.dump(exp),
        model_state=initial,
        optimizer_state={"x": torch.zeros(1)},
        details={},
    )

    def start(folder: str, exp: Experiment) -> Path:
        return write_start(
            tmp_path / folder,
            read_checkpoint(source),
            model=exp.model,
            optimizer=exp.training.optimizer,
            tree=cfg.dump(exp),
            data_fingerprint=fingerprint,
        )

    assert start("started", exp) == step_folder(tmp_path / "started", 0)
    train(exp, tmp_path / "started")
    train(exp, tmp_path / "drawn")
    assert_identical(tmp_path / "started", tmp_path / "drawn")
    with pytest.raises(CheckpointError, match=r"model.dim"):
        start("wrong", exp.override({"model.dim": 64}))
    assert not (tmp_path / "wrong").exists()
