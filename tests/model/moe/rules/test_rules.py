"""Rules against what they say, pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blues.errors import ConfigError
from blues.model.moe.routers import SoftmaxTopK
from blues.model.moe.routers.noise import LinearNoise
from blues.model.moe.routing import Router, Routing
from blues.model.moe.rules import CapacityByPosition, CapacityByWeight, ExpertDropout, PairDropout, Rule, SkipLight
from blues.model.moe.rules.capacity import places_in_queue
from tests.model.moe.routers.examples import context, make, tokens

E = 6


def build(config, router=None, **sizes) -> Rule:
    router = router or make(SoftmaxTopK.Config(), num_experts=E, **sizes)
    return config.build(router=router, share_E=[1 / E] * E)


def routed(n=64, top_k=2, seed=0, empty=False) -> Routing:
    routing = make(SoftmaxTopK.Config(), num_experts=E, top_k=top_k, seed=seed)(tokens(n), context(n))
    if empty:
        none = torch.rand(routing.ids_TK.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
        ids, weights = routing.ids_TK.masked_fill(none, E), routing.weights_TK.masked_fill(none, 0)
        routing = routing._replace(ids_TK=ids, weights_TK=weights)
    return routing


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("beta", [0.2, 0.7, 1.0])
def test_skip_light_drops_what_is_light_and_keeps_the_sum(top_k, beta):
    routing = routed(top_k=top_k)
    rule = build(SkipLight.Config(beta=beta), top_k=top_k).eval()
    left = rule(routing, context())
    columns = (routing.weights_TK, left.weights_TK, routing.ids_TK, left.ids_TK)
    for before, after, ids, new in zip(*(x.tolist() for x in columns), strict=True):
        kept = [weight for weight in before if weight >= beta * max(before)]
        for old, weight, expert, now in zip(before, after, ids, new, strict=True):
            assert now == (expert if old in kept else E)
            assert weight == pytest.approx(old / sum(kept) * sum(before) if old in kept else 0, abs=1e-6)
    assert (left.ids_TK == E).any()


def test_skip_light_applies_in_evaluation_and_in_training_if_asked():
    assert build(SkipLight.Config(beta=0.5)).eval().applies and not build(SkipLight.Config(beta=0.5)).train().applies
    assert build(SkipLight.Config(beta=0.5, in_training=True)).train().applies


def test_skip_light_follows_the_median_ratio():
    rule, routing = build(SkipLight.Config()), routed()
    torch.testing.assert_close(rule.eval()(routing, context()), routing)  # nothing is skipped before the first update
    median = (routing.weights_TK.amin(dim=1) / routing.weights_TK.amax(dim=1)).median()
    sums = rule.statistics(routing)
    rule.adapt(sums + sums)
    torch.testing.assert_close(rule.ratio, median)
    left = rule(routing, context())
    assert (left.ids_TK == E).sum().item() == pytest.approx(32, abs=1)  # half of the tokens are below the median
    other = rule.statistics(routed(seed=5))
    rule.adapt(other)
    torch.testing.assert_close(rule.ratio, 0.99 * median + 0.01 * other[0])
    assert rule.bfloat16().ratio.dtype == torch.float32 and "ratio" in rule.state_dict()


def test_skip_light_reaches_the_router():
    router = make(SoftmaxTopK.Config(), num_experts=E, top_k=3)
    left = build(SkipLight.Config(beta=0.5), router)(router(tokens(), context()), context())
    (left.weights_TK * torch.arange(3)).sum().backward()
    assert router.weight.grad.isfinite().all() and router.weight.grad.any()


def capacity_naive(routing: Routing, limit: int, by_weight: bool) -> torch.Tensor:
    """Serve pair after pair."""
    T, K = routing.ids_TK.shape
    pairs = [(t, k) for k in range(K) for t in range(T)]
    if by_weight:
        pairs = sorted([(t, k) for t in range(T) for k in range(K)], key=lambda p: -routing.weights_TK[p].item())
    ids, held = routing.ids_TK.clone(), [0] * (E + 1)
    for pair in pairs:
        expert = int(ids[pair])
        if expert < E and held[expert] >= limit:
            ids[pair] = E
        held[expert] += 1
    return ids


@given(
    n=st.integers(1, 40),
    top_k=st.integers(1, 3),
    factor=st.sampled_from([0.1, 0.5, 1.0, 1.5, 6.0]),
    empty=st.booleans(),
)
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("kind", [CapacityByPosition, CapacityByWeight])
def test_capacity_serves_pairs_in_its_order(kind, n, top_k, factor, empty):
    routing = routed(n, top_k, seed=n, empty=empty)
    left = build(kind.Config(factor=factor), top_k=top_k)(routing, context(n))
    limit = max(1, math.ceil(round(factor * n * top_k / E, 6)))
    assert torch.equal(left.ids_TK, capacity_naive(routing, limit, kind is CapacityByWeight))
    kept = left.ids_TK < E
    assert torch.equal(left.weights_TK[kept], routing.weights_TK[kept]) and not left.weights_TK[~kept].any()
    assert torch.bincount(left.ids_TK[kept], minlength=E).max() <= limit
    if factor >= E:
        assert torch.equal(left.ids_TK, routing.ids_TK)


def test_a_capacity_of_one_drops_nothing_when_the_load_is_even_and_applies_in_training_alone():
    ids = torch.arange(12).view(6, 2) % E
    routing = Routing(torch.full((6, 2), 0.5), ids, torch.full((6, E), 1 / E), torch.zeros(6, E))
    rule = build(CapacityByPosition.Config(factor=1.0))
    assert torch.equal(rule(routing, context(6)).ids_TK, ids)
    assert rule.train().applies and not rule.eval().applies


def test_capacities_follow_the_shares_of_the_experts():
    rule = CapacityByPosition.Config(factor=1.0).build(
        router=make(SoftmaxTopK.Config(), num_experts=3, top_k=1), share_E=[0.25, 0.25, 0.5]
    )
    ids = torch.tensor([0] * 4 + [2] * 4)[:, None]
    left = rule(Routing(torch.ones(8, 1), ids, torch.zeros(8, 3), torch.zeros(8, 3)), context(8))
    assert left.ids_TK.flatten().tolist() == [0, 0, 3, 3, 2, 2, 2, 2]


def test_places_in_queue_count_earlier_equals():
    assert places_in_queue(torch.tensor([2, 0, 2, 2, 0, 3]), 3).tolist() == [0, 0, 1, 2, 1, 0]


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.999999])
def test_expert_dropout_leaves_out_whole_experts_but_never_all(rate):
    rule, routing, out = build(ExpertDropout.Config(rate=rate)), routed(), 0
    for seed in range(20):
        torch.manual_seed(seed)
        left = rule(routing, context())
        for expert in range(E):
            held = left.ids_TK[routing.ids_TK == expert]
            assert bool((held == expert).all()) or bool((held == E).all())
        assert (left.ids_TK < E).any()
        out += E - len(left.ids_TK[left.ids_TK < E].unique())
        sums = left.weights_TK.sum(dim=1)
        lost = (left.ids_TK == E).all(dim=1)
        torch.testing.assert_close(sums[~lost], torch.ones_like(sums[~lost]))
        assert not sums[lost].any()
    assert {0.0: out == 0, 0.5: 30 < out < 90, 0.999999: out == 20 * (E - 1)}[rate]


@pytest.mark.parametrize("empty", [False, True])
def test_pair_dropout_never_takes_all_of_a_token(empty):
    rule, routing = build(PairDropout.Config(rate=0.9)), routed(top_k=3, empty=empty)
    torch.manual_seed(0)
    left = rule(routing, context())
    had, has = (routing.ids_TK < E).sum(dim=1), (left.ids_TK < E).sum(dim=1)
    assert bool(((has >= 1) | (had == 0)).all()) and has.sum() < had.sum() / 2
    torch.testing.assert_close(left.weights_TK.sum(dim=1), routing.weights_TK.sum(dim=1))


def test_dropout_goes_by_its_schedule():
    rule = build(ExpertDropout.Config(rate=0.8, schedule=LinearNoise.Config(over=0.5)))
    routing = routed()
    torch.manual_seed(0)
    assert not torch.equal(rule(routing, context(progress=0.0)).ids_TK, routing.ids_TK)
    assert torch.equal(rule(routing, context(progress=0.5)).ids_TK, routing.ids_TK)


@pytest.mark.parametrize(
    ("rule", "router", "top_k", "words"),
    [
        (SkipLight.Config(), "relu", 2, "router=relu"),
        (CapacityByPosition.Config(), "expert_choice", 2, "router=expert_choice"),
        (CapacityByWeight.Config(), "threshold", 2, "router=threshold"),
    ],
)
@pytest.mark.filterwarnings("ignore:moe.router=expert_choice")
def test_rules_that_make_no_sense_with_a_router_are_refused(rule, router, top_k, words):
    with pytest.raises(ConfigError, match=words):
        build(rule, make(Router.variants[router].Config(), top_k=top_k))


@pytest.mark.parametrize(
    ("field", "make_config"),
    [
        ("beta", lambda: SkipLight.Config(beta=1.5)),
        ("factor", lambda: CapacityByWeight.Config(factor=0)),
        ("rate", lambda: ExpertDropout.Config(rate=1.0)),
    ],
)
def test_bad_settings_are_refused_by_name(field, make_config):
    with pytest.raises(ConfigError, match=f"^{field}"):
        make_config()
