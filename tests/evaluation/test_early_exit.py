"""The trade-off of early exit against forwards that are compared by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from blues.errors import ConfigError
from blues.evaluation.early_exit import at_threshold, calibrate, calibration_table
from blues.model.depth import EarlyExit
from tests.model.examples import lively, small, tokens

THRESHOLDS = (0.0, 0.03, 1.0)


def model_of():
    config = small(moe__router="softmax_top_k")
    return lively(config.replace(depth=EarlyExit.Config(exits=(0, 2), threshold=0.03)).build())


def test_each_threshold_is_compared_with_the_whole_model():
    model = model_of().double().train()
    ids = tokens(model, batch=3)
    found = calibrate(model, ids, THRESHOLDS)
    assert model.training and model.depth.config.threshold == 0.03
    model.eval()
    inputs, targets = ids[:, :-1], ids[:, 1:]
    with torch.no_grad(), at_threshold(model, 1.0):
        whole = model(inputs).logits_BTV
    for tradeoff, threshold in zip(found, THRESHOLDS, strict=True):
        with torch.no_grad(), at_threshold(model, threshold):
            logits = model(inputs).logits_BTV
            left = [int(model(row[None]).compute_LC[:, 1].sum()) for row in inputs]
        same = logits.argmax(dim=-1) == whole.argmax(dim=-1)
        assert tradeoff.threshold == threshold
        assert tradeoff.agreement == pytest.approx(same.double().mean().item())
        assert tradeoff.layers == pytest.approx(sum(left) / (4 * inputs.numel()))
        assert tradeoff.cross_entropy == pytest.approx(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())
    none, some, all_layers = found
    assert none.layers == 0.25 < some.layers < all_layers.layers == 1
    assert none.agreement < some.agreement < all_layers.agreement == 1
    text = calibration_table(found)
    assert "threshold" in text and "100.0%" in text and f"{some.cross_entropy:.4f}" in text


def test_what_is_not_scored_counts_in_neither_agreement_nor_loss():
    model = model_of().double()
    ids = tokens(model)
    targets = ids[:, 1:].clone()
    targets[:, :10] = -100
    masked = calibrate(model, ids[:, :-1], [0.03], targets)[0]
    everything = calibrate(model, ids, [0.03])[0]
    assert masked.layers == everything.layers and masked.cross_entropy != everything.cross_entropy


def test_models_without_exits_and_impossible_thresholds_are_refused():
    plain = small().build()
    with pytest.raises(ConfigError, match="model.depth=early_exit"):
        calibrate(plain, tokens(plain))
    model = model_of()
    with pytest.raises(ConfigError, match="threshold: must be from 0 to 1"):
        calibrate(model, tokens(model), [1.5])
