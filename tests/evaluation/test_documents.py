"""A document read in chunks has the loss of one whole forward; with windows, in memory that does not grow."""

from __future__ import annotations

import pytest
import torch

from blues.errors import ConfigError
from blues.evaluation.documents import document_loss, make_cache
from blues.inference.cache import Cache
from blues.inference.windowed import WindowedCache, reach
from blues.training.memory import peak_bytes
from tests.model.examples import lively, small, tokens

ROUNDING = 1e-6
"""Tables of rotations are float32: the same distance at other positions differs in the last bit."""

WINDOW = {"attention__pattern": "sliding_window", "attention__pattern__window": 6}
MIXED = {
    "attention__pattern": "by_layer",
    "attention__pattern__patterns": [
        {"variant": "sliding_window", "window": 3},
        {"variant": "all_of", "patterns": [{"variant": "sliding_window", "window": 9}, {"variant": "causal"}]},
    ],
}


def make(**changes):
    return lively(small(**changes).build(seed=0).double()).eval()


@pytest.mark.parametrize("changes", [{}, WINDOW, MIXED])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_loss_is_that_of_a_whole_forward(changes, chunk):
    model = make(**changes)
    ids = tokens(model, batch=1, length=51)
    assert isinstance(make_cache(model, 50, chunk), WindowedCache if changes else Cache)
    expected = model(ids[:, :-1], ids[:, 1:]).losses.cross_entropy.item()
    assert document_loss(model, ids[0], chunk=chunk) == pytest.approx(expected, abs=ROUNDING)


def test_a_windowed_cache_equals_the_unbounded_one_token_by_token_and_stays_as_large():
    model = make(**MIXED)
    ids = tokens(model, batch=2, length=80)
    sizes = {"num_layers": 4, "rows": 2, "num_kv_heads": 1, "head_dim": 8, "dtype": torch.float64}
    small_cache = WindowedCache(**sizes, reach=reach(model.config), chunk=5)
    whole = Cache(**sizes, capacity=80)
    num_bytes, start = small_cache.num_bytes, 0
    for width in [5, 1, 1, 3, 5, 5] + [4] * 15:
        logits = [model(ids[:, start : start + width], cache=cache).logits_BTV for cache in (small_cache, whole)]
        for cache in (small_cache, whole):
            cache.advance([width, width])
        torch.testing.assert_close(*logits, atol=10 * ROUNDING, rtol=10 * ROUNDING)
        start += width
        assert small_cache.num_bytes == num_bytes and small_cache.length <= 2 * 8 + 5
    assert small_cache.seen == whole.length == 80


def test_memory_of_a_windowed_document_is_flat():
    model = lively(small(**WINDOW).build(seed=0)).eval()
    short, long = (tokens(model, batch=1, length=length)[0] for length in (129, 513))
    document_loss(model, short, chunk=32)  # tables of rotations exist from now on
    assert peak_bytes(lambda: document_loss(model, long, chunk=32)) <= peak_bytes(
        lambda: document_loss(model, short, chunk=32)
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "causal of layer 0 may see any token"),
        (WINDOW | {"attention__pattern__sinks": 2}, "sliding_window of layer 0"),
        (WINDOW | {"attention__rope": "dynamic_ntk"}, "forgets the length"),
    ],
)
def test_what_sees_further_is_refused(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        reach(small(**changes))


def test_wrong_use_is_refused():
    cache = WindowedCache(num_layers=1, rows=2, num_kv_heads=1, head_dim=2, reach=4, chunk=2)
    with pytest.raises(ValueError, match="read them in chunks"):
        cache.update(0, torch.zeros(2, 3, 1, 2), torch.zeros(2, 3, 1, 2))
    with pytest.raises(ValueError, match="equally many"):
        cache.advance([1, 2])
    with pytest.raises(ConfigError, match="two tokens"):
        document_loss(make(), torch.tensor([1]))
