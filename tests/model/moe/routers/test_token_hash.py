import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blues.model.context import Context
from blues.model.losses import load_balancing_loss, router_z_loss
from blues.model.moe.routers import TokenHash
from tests.model.moe.routers.examples import make, tokens


@settings(max_examples=20, deadline=None)
@given(num_experts=st.integers(1, 9), seed=st.integers(0, 1000), data=st.data())
def test_ids_are_dealt_out_evenly_to_distinct_experts(num_experts, seed, data):
    top_k = data.draw(st.integers(1, num_experts))
    router = make(TokenHash.Config(seed=seed), num_experts=num_experts, top_k=top_k)
    ids = router.experts_of(torch.arange(num_experts * 50))
    assert all(len(set(row)) == top_k for row in ids.tolist())
    for slot in range(top_k):
        runs = ids[:, slot].unflatten(0, (50, num_experts)).sort(dim=1).values
        assert bool((runs == torch.arange(num_experts)).all()), "each run of neighbours covers every expert"


def test_the_token_alone_decides_and_seeds_differ():
    ids = torch.tensor([[5, 9, 5, 200_000]])
    router = make(TokenHash.Config())
    first, second = (router(tokens(4, seed=seed), Context(ids)) for seed in (0, 1))
    assert torch.equal(first.ids_TK, second.ids_TK) and torch.equal(first.ids_TK[0], first.ids_TK[2])
    assert bool((first.weights_TK == 0.5).all()) and not list(router.parameters())
    other = make(TokenHash.Config(seed=1))
    many = torch.arange(6000)
    assert (other.experts_of(many) == router.experts_of(many)).float().mean() == pytest.approx(1 / 6, abs=0.05)


def test_pairs_of_experts_occur_about_equally_often():
    pairs = make(TokenHash.Config()).experts_of(torch.arange(60_000)).sort(dim=1).values
    counts = torch.bincount(pairs[:, 0] * 6 + pairs[:, 1], minlength=36)
    assert int((counts > 0).sum()) == 15 and counts.max() < 1.2 * 60_000 / 15


def test_its_losses_are_constants():
    routing = make(TokenHash.Config())(tokens(6), Context(torch.arange(6)[None]))
    assert router_z_loss(routing).item() == pytest.approx(0, abs=1e-10)
    assert load_balancing_loss(routing).item() == pytest.approx(1, abs=1e-5)
