"""Loss by position: equal to the loss from whole logits, each stretch by itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from blues.errors import ConfigError, DataError
from blues.evaluation import positions
from blues.evaluation.long_context import held_out, measure
from blues.evaluation.positions import PositionLosses, Positions, token_losses
from tests.evaluation.stores import make_store
from tests.inference.models import tiny


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    words = ["def main(argument):\n    return argument + 1\n\n"] * 40
    return str(make_store(tmp_path_factory.mktemp("data") / "store", train=words, validation=words))


def test_the_loss_of_each_token_equals_that_from_all_logits(monkeypatch):
    monkeypatch.setattr(positions, "TOKENS_AT_ONCE", 7)
    model = tiny().model
    tokens = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, 1).clone()
    targets[1, 5:] = -100
    with torch.no_grad():
        logits_BTV = model(tokens).logits_BTV
        nats_BT = token_losses(model, tokens, targets)
        mean = float(model(tokens, targets).losses.cross_entropy)
    expected = F.cross_entropy(logits_BTV.flatten(0, 1), targets.flatten(), reduction="none").view(3, 20)
    assert torch.isnan(nats_BT[1, 5:]).all() and not torch.isnan(nats_BT[0]).any()
    torch.testing.assert_close(nats_BT[targets >= 0], expected[targets >= 0])
    assert float(nats_BT.nanmean()) == pytest.approx(mean, rel=1e-5)


def test_stretches_have_their_own_means_and_intervals():
    nats_NT = np.array([[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, math.nan, 6.0]])
    found = PositionLosses.of(nats_NT, 2)
    assert found.edges == (0, 2, 4) and found.nats == (2.0, pytest.approx(13 / 3))
    assert found.spread[0] == pytest.approx(1.96 * np.std([1.5, 2.5], ddof=1) / math.sqrt(2))
    assert found.mean(0, 4) == pytest.approx((2 + 13 / 3) / 2) and math.isnan(found.mean(1, 2))
    middle, low, high = found.perplexities()[0]
    assert low < middle < high and middle == pytest.approx(math.exp(2))
    assert PositionLosses.from_tree(found.to_tree()) == found
    assert "0-2" in found.table() and "positions/0-2/perplexity" in found.metrics()
    assert math.isnan(PositionLosses.of(nats_NT[:1], 1).spread[0])


def test_held_out_sequences_of_the_whole_context(store):
    loaded = tiny()
    data = held_out(loaded, store)
    found = Positions.Config(samples=10, buckets=6, batch_size=4).build().run(loaded, data)
    assert found.edges == (0, 8, 16, 24, 32, 40, 48) and found.sequences == 10
    again = Positions.Config(samples=10, buckets=6, batch_size=3).build().run(loaded, data)
    np.testing.assert_allclose(found.nats, again.nats, rtol=1e-4)


def test_what_cannot_be_measured_is_refused(store):
    with pytest.raises(DataError, match="--data-cache-dir"):
        held_out(tiny())
    with pytest.raises(DataError, match="too few for one sequence of 100,000"):
        held_out(tiny(max_seq_len=100_000), store)
    with pytest.raises(ConfigError, match="samples"):
        Positions.Config(samples=0)
    with pytest.raises(ConfigError, match="buckets"):
        Positions.Config(buckets=0)


def test_members_are_measured_by_name(store):
    loaded = tiny(max_seq_len=128)
    found = measure(loaded, ["positions", "tracking"], store, length=64, samples=4)
    assert list(found) == ["positions", "tracking"]
    assert found["positions"].to_tree()["edges"][-1] == 64 and "tracking/64/accuracy" in found["tracking"].metrics()
    with pytest.raises(ConfigError, match="unknown long-context measurement 'retreival'. Did you mean 'retrieval'"):
        measure(loaded, ["retreival"], store)
    with pytest.raises(ConfigError, match="sees 128 tokens at once, got 129; `blues extend`"):
        measure(loaded, ["positions"], store, length=129)
