"""Expert statistics against a naive computation in numpy."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blues.tracking.metrics import (
    ExpertStatistics,
    load_cv,
    load_entropy,
    load_metric,
    max_violation,
    routing_entropy,
)


class Routed(NamedTuple):
    ids_TK: Tensor
    probs_TE: Tensor


def random_routing(seed: int, tokens: int, experts: int, k: int) -> Routed:
    generator = torch.Generator().manual_seed(seed)
    probs_TE = torch.softmax(3 * torch.randn(tokens, experts, generator=generator), -1)
    return Routed(probs_TE.topk(k, -1).indices, probs_TE)


def naive(batches: list[Routed], experts: int) -> dict[str, float | np.ndarray]:
    """One layer, one token and one choice at a time."""
    count_E, entropies = np.zeros(experts), []
    for routed in batches:
        for ids_K in routed.ids_TK.tolist():
            for expert in ids_K:
                count_E[expert] += 1
        for probs_E in routed.probs_TE.tolist():
            entropies.append(-sum(p * math.log(p) for p in probs_E if p > 0) / math.log(experts))
    load_E = count_E / count_E.sum()
    return {
        "load": load_E,
        "balance": load_E.max() / load_E.mean() - 1,
        "cv": np.sqrt(((load_E - load_E.mean()) ** 2).mean()) / load_E.mean(),
        "entropy": -sum(p * math.log(p) for p in load_E if p > 0) / math.log(experts),
        "routing_entropy": np.mean(entropies),
    }


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    experts=st.integers(2, 9),
    k=st.integers(1, 2),
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3),
)
def test_statistics_equal_a_naive_count(seed: int, experts: int, k: int, sizes: list[int]) -> None:
    layers = (1, 3)
    batches = [
        [random_routing(seed + 100 * step + layer, tokens, experts, k) for layer in layers]
        for step, tokens in enumerate(sizes)
    ]
    statistics = ExpertStatistics(layers, experts)
    for batch in batches:
        statistics.update(batch)
    summary = statistics.read()
    assert summary.tokens == sum(sizes)
    for index in range(len(layers)):
        expected = naive([batch[index] for batch in batches], experts)
        np.testing.assert_allclose(summary.load_LE[index], expected["load"], rtol=1e-12)
        assert summary.balance_L[index] == pytest.approx(expected["balance"], rel=1e-9, abs=1e-12)
        assert summary.load_cv_L[index] == pytest.approx(expected["cv"], rel=1e-9, abs=1e-12)
        assert summary.load_entropy_L[index] == pytest.approx(expected["entropy"], rel=1e-9, abs=1e-12)
        assert summary.routing_entropy_L[index] == pytest.approx(
            expected["routing_entropy"],
            rel=1e-5,
            abs=1e-6,  # float32 probabilities near 1 have no more digits
        )


def test_balanced_and_collapsed_loads() -> None:
    load_LE = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]], dtype=torch.float64)
    assert max_violation(load_LE).tolist() == [0, 3, 1]  # E / K - 1 for K experts that get everything
    assert load_cv(load_LE).tolist() == pytest.approx([0, math.sqrt(3), 1])
    assert load_entropy(load_LE).tolist() == pytest.approx([1, 0, 0.5])


def test_routing_entropy_of_certain_undecided_and_unnormalized_routers() -> None:
    probs_TE = torch.tensor([[1.0, 0, 0, 0], [0.25] * 4, [0.9] * 4])
    assert routing_entropy(probs_TE).tolist() == pytest.approx([0, 1, 1])
    half = routing_entropy(probs_TE.bfloat16())
    assert half.dtype == torch.float32
    assert half.tolist() == pytest.approx([0, 1, 1], abs=1e-6)


def test_ranks_add_their_counts() -> None:
    ours, theirs, both = (ExpertStatistics((0,), 4) for _ in range(3))
    first, second = random_routing(0, 7, 4, 2), random_routing(1, 5, 4, 2)
    ours.update([first])
    theirs.update([second])
    both.update([first])
    both.update([second])
    ours.counts += theirs.counts  # what all_reduce does
    assert ours.read() == both.read()


def test_reset_starts_anew_and_empty_is_an_error() -> None:
    statistics = ExpertStatistics((0,), 4)
    with pytest.raises(ValueError, match="no tokens"):
        statistics.read()
    statistics.update([random_routing(0, 7, 4, 2)])
    statistics.reset()
    routed = random_routing(1, 5, 4, 2)
    statistics.update([routed])
    np.testing.assert_allclose(statistics.read().load_LE[0], naive([routed], 4)["load"])
    with pytest.raises(ValueError, match="1 layers, got 2"):
        statistics.update([routed, routed])
    with pytest.raises(ValueError, match="at least one"):
        ExpertStatistics((), 4)
    with pytest.raises(ValueError, match="one expert in each"):
        ExpertStatistics((0, 1), [4])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_empty_slots_are_no_load_and_layers_differ_in_experts_and_slots(seed: int, sizes: list[int]) -> None:
    """Slots with the id E of their own layer hold no expert."""
    random = np.random.default_rng(seed)
    routings = []
    for experts in sizes:
        k = int(random.integers(1, experts + 1))
        ids_TK = np.stack([random.permutation(experts + 1)[:k] for _ in range(6)])
        routings.append(Routed(torch.from_numpy(ids_TK), torch.rand(6, experts)))
    statistics = ExpertStatistics(range(len(sizes)), sizes)
    statistics.update(routings)
    summary = statistics.read()
    for layer, (routed, experts) in enumerate(zip(routings, sizes, strict=True)):
        chosen = [expert for row in routed.ids_TK.tolist() for expert in row if expert < experts]
        count_E = np.array([chosen.count(expert) for expert in range(experts)])
        np.testing.assert_allclose(summary.load_LE[layer], count_E / max(1, len(chosen)))
        assert summary.experts_per_token_L[layer] == pytest.approx(len(chosen) / 6)
        if chosen:
            assert summary.balance_L[layer] == pytest.approx(count_E.max() / count_E.mean() - 1, abs=1e-12)
        else:
            assert math.isnan(summary.balance_L[layer])
            assert math.isnan(summary.load_entropy_L[layer])


def test_an_interval_evens_out_what_single_updates_do_not() -> None:
    statistics = ExpertStatistics((0,), 2)
    even = torch.full((4, 2), 0.5)
    for expert in (0, 1):
        statistics.next_update()
        statistics.update([Routed(torch.full((4, 1), expert), even)])
    summary = statistics.read()
    assert (summary.balance, summary.interval_balance_L) == (1.0, [0.0])
    assert summary.load_LE == [[0.0, 1.0]]
    assert summary.tokens == 4


def test_one_copy_per_read_and_none_per_update(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    plain = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: copies.append(self.shape) or plain(self))
    for name in ("item", "tolist", "numpy", "nonzero", "__bool__"):
        monkeypatch.setattr(Tensor, name, lambda self, name=name: pytest.fail(f"{name} waits for the device"))
    statistics = ExpertStatistics((0, 1), 4)
    routed = random_routing(0, 7, 4, 2)
    for _ in range(3):
        statistics.update([routed, routed])
    assert copies == []
    monkeypatch.undo()
    monkeypatch.setattr(Tensor, "cpu", lambda self: copies.append(self.shape) or plain(self))
    statistics.read()
    assert copies == [(2, 2, 7)]


def test_metric_names_and_values() -> None:
    statistics = ExpertStatistics((1, 3), 2)
    even = Routed(torch.tensor([[0], [1]]), torch.full((2, 2), 0.5))
    odd = Routed(torch.tensor([[0], [0]]), torch.full((2, 2), 0.5))
    statistics.update([even, odd])
    summary = statistics.read()
    assert load_metric(1, 0) == "experts/layer_01/load_00"
    assert summary.metrics() == {
        "experts/balance": 0.5,
        "experts/interval_balance": 0.5,
        "experts/load_cv": 0.5,
        "experts/load_entropy": 0.5,
        "experts/routing_entropy": 1.0,
        "experts/experts_per_token": 1.0,
        "experts/layer_01/balance": 0.0,
        "experts/layer_01/load_00": 0.5,
        "experts/layer_01/load_01": 0.5,
        "experts/layer_03/balance": 1.0,
        "experts/layer_03/load_00": 1.0,
        "experts/layer_03/load_01": 0.0,
    }


def test_reads_the_model_s_routing() -> None:
    from blues.model.moe.routing import Routing

    routed = random_routing(0, 6, 4, 2)
    routing = Routing(
        weights_TK=torch.ones(6, 2), ids_TK=routed.ids_TK, probs_TE=routed.probs_TE, logits_TE=routed.probs_TE.log()
    )
    statistics = ExpertStatistics((0,), 4)
    statistics.update([routing])
    np.testing.assert_allclose(statistics.read().load_LE[0], naive([routed], 4)["load"])
