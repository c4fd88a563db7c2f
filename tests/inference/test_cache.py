"""The KV cache holds exactly what was put in, in place, whatever the lengths."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blues.inference.cache import Cache

LAYERS, HEADS, CHANNELS = 2, 1, 3


def make(rows: int, capacity: int = 4) -> Cache:
    return Cache(num_layers=LAYERS, rows=rows, num_kv_heads=HEADS, head_dim=CHANNELS, capacity=capacity)


def step(cache: Cache, rows: int, new: int, counts: list[int]) -> tuple[torch.Tensor, list]:
    """One forward's updates with random keys; values are the keys negated. Returns layer-1 keys in, outputs."""
    keys = torch.randn(LAYERS, rows, new, HEADS, CHANNELS)
    outputs = [cache.update(layer, keys[layer], -keys[layer]) for layer in range(LAYERS)]
    cache.advance(counts)
    return keys, outputs


def test_even_rows_equal_concatenation_and_growth_loses_nothing():
    cache, seen = make(rows=2, capacity=2), []
    for new in (2, 1, 1, 5):
        keys, outputs = step(cache, 2, new, [new, new])
        seen.append(keys)
        for layer in range(LAYERS):
            expected = torch.cat(seen, dim=2)[layer]
            assert torch.equal(outputs[layer][0], expected)
            assert torch.equal(outputs[layer][1], -expected)
    assert cache.length == 9 and cache.capacity >= 9


def test_growth_is_at_least_doubling():
    cache = make(rows=1, capacity=8)
    cache.reserve(9)
    assert cache.capacity == 16
    cache.reserve(100)
    assert cache.capacity == 100
    assert cache.num_bytes == 2 * LAYERS * 100 * HEADS * CHANNELS * 4


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rows_of_different_length_match_lists(data):
    rows = data.draw(st.integers(1, 4))
    cache, expected = make(rows), [[] for _ in range(rows)]
    for _ in range(data.draw(st.integers(1, 6))):
        new = data.draw(st.integers(1, 4))
        counts = data.draw(st.lists(st.integers(0, new), min_size=rows, max_size=rows))
        assert cache.positions(new).tolist() == [list(range(len(e), len(e) + new)) for e in expected]
        keys, outputs = step(cache, rows, new, counts)
        for row, count in enumerate(counts):
            held = len(expected[row])
            for layer in range(LAYERS):
                # what the causal rule lets this row's real tokens see: its own tokens, then the new ones
                before = [pair[layer] for pair in expected[row]]
                visible = torch.stack([*before, *keys[layer, row]])
                assert torch.equal(outputs[layer][0][row, : held + new], visible)
            expected[row] += [keys[:, row, t] for t in range(count)]
        assert cache.lengths == [len(e) for e in expected] and cache.length == max(map(len, expected))


def test_select_keeps_rows_in_the_order_asked_for():
    cache = make(rows=3)
    keys, _ = step(cache, 3, 4, [4, 2, 3])
    cache.select([2, 0])
    assert cache.lengths == [3, 4]
    assert torch.equal(cache.k_LBSGC[:, 0, :3], keys[:, 2, :3])
    assert torch.equal(cache.v_LBSGC[:, 1, :4], -keys[:, 0])
