"""Sampling: the kept sets are what the definitions say, and draws follow the distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blues import config as cfg
from blues.errors import CheckpointError, ConfigError
from blues.inference.sampling import Sampling, draw, keep_top_k, keep_top_p, sample

LOGITS = st.lists(st.floats(-20, 20, allow_nan=False), min_size=1, max_size=40)
GRID = st.lists(st.integers(-6, 6), min_size=1, max_size=12)  # many ties


def kept(logits_V: torch.Tensor) -> set[int]:
    return set(logits_V.isfinite().nonzero().flatten().tolist())


def by_definition(logits: list[float], p: float) -> set[int]:
    """The nucleus, one token at a time in exact order: most probable first, the lower id first in a tie."""
    probs = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
    chosen, mass = set(), 0.0
    for token in sorted(range(len(logits)), key=lambda token: (-logits[token], token)):
        if mass >= p:
            break
        chosen.add(token)
        mass += probs[token]
    return chosen


@settings(max_examples=150, deadline=None)
@given(logits=st.one_of(LOGITS, GRID), p=st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    logits_V = torch.tensor([logits], dtype=torch.float64)
    chosen = kept(keep_top_p(logits_V, p)[0])
    probs = logits_V[0].softmax(0)
    mass = probs[list(chosen)].sum().item()
    assert chosen == by_definition(logits, p)
    assert mass >= p - 1e-12
    assert mass - probs[list(chosen)].min().item() < p + 1e-12, "a smaller set would have done"


@settings(max_examples=80, deadline=None)
@given(logits=st.lists(st.integers(-1000, 1000), min_size=1, max_size=30, unique=True), data=st.data())
def test_kept_sets_do_not_depend_on_the_order_of_the_vocabulary(logits, data):
    order = data.draw(st.permutations(range(len(logits))))
    p, k = data.draw(st.floats(0.05, 0.95)), data.draw(st.integers(1, len(logits)))
    straight = torch.tensor([logits], dtype=torch.float64) / 300
    for keep, setting in ((keep_top_p, p), (keep_top_k, k)):
        shuffled = kept(keep(straight[:, order], setting)[0])
        assert {order[place] for place in shuffled} == kept(keep(straight, setting)[0])


@settings(max_examples=80, deadline=None)
@given(logits=st.one_of(LOGITS, GRID), k=st.integers(0, 45))
def test_top_k_keeps_the_k_largest_unchanged(logits, k):
    logits_V = torch.tensor([logits], dtype=torch.float64)
    out = keep_top_k(logits_V, k)[0]
    best = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: k or len(logits)]
    assert kept(out) == set(best)
    assert torch.equal(out[best], logits_V[0, best])


def test_each_row_is_cut_by_itself():
    logits_BV = torch.tensor([[0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    out = keep_top_p(logits_BV, 0.5)
    assert kept(out[0]) == {1} and kept(out[1]) == {0, 1}


@pytest.mark.parametrize(
    "settings_",
    [
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.5, "top_p": 1.0},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.3, "top_p": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 4},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(settings_):
    """Chi-square over 20,000 draws of a fixed seed: the 99.99% quantile for at most 5 degrees of freedom is 25.7."""
    logits = [2.0, 1.0, 0.5, 0.0, -1.0, -2.0]
    expected = torch.tensor(logits, dtype=torch.float64) / settings_["temperature"]
    expected = keep_top_k(expected[None], settings_.get("top_k", 0))
    probs = keep_top_p(expected, settings_["top_p"])[0].softmax(0)
    count = 20_000
    config = Sampling.Config(**settings_)
    uniform = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    ids = sample(torch.tensor(logits).expand(count, -1), config, uniform)
    observed = torch.bincount(ids, minlength=len(logits)).double()
    assert observed[probs == 0].sum() == 0
    possible = probs > 0
    chi_square = ((observed - count * probs)[possible] ** 2 / (count * probs)[possible]).sum().item()
    assert chi_square < 25.7


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=20).filter(any),
    uniform=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, math.nextafter(1.0, 0.0)])),
)
def test_draw_is_the_inverse_of_the_distribution_and_never_impossible(weights, uniform):
    token = int(draw(torch.tensor([weights]), torch.tensor([uniform], dtype=torch.float64)))
    exact = torch.tensor(weights).double()
    assert exact[token] > 0
    below, total = exact[:token].sum().item(), exact.sum().item()
    slack = 1e-12 * total
    assert below - slack <= uniform * total <= below + exact[token].item() + slack


def make(rows: int = 1, size: int = 8, allowed: int = 8, **settings_: float) -> Sampling:
    config = cfg.load(Sampling.Config, settings_)
    return Sampling(config, allowed_V=torch.arange(size) < allowed, rows=rows)


def test_temperature_zero_is_greedy_and_a_tiny_one_nearly_so():
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, -1.0, 0.0]])
    for temperature in (0.0, 1e-300, 1e-3):
        assert make(rows=2, size=3, temperature=temperature)(logits).tolist() == [1, 0]


def test_forbidden_ids_are_never_chosen_however_likely():
    logits = torch.zeros(1, 8)
    logits[:, 5:] = 50.0
    for temperature in (0.0, 1.0, 100.0):
        sampler = make(allowed=5, temperature=temperature, top_p=1.0)
        assert {int(sampler(logits)) for _ in range(200)} <= set(range(5))


def test_rows_have_streams_of_their_own_and_a_seed_fixes_them():
    logits = torch.zeros(3, 64)
    both, alone = make(rows=3, size=64, allowed=64, seed=5, top_p=1), make(rows=1, size=64, allowed=64, seed=5, top_p=1)
    together = [both(logits).tolist() for _ in range(20)]
    assert [ids[0] for ids in together] == [int(alone(logits[:1])) for _ in range(20)]
    assert [ids[0] for ids in together] != [ids[1] for ids in together]
    other = make(rows=3, size=64, allowed=64, seed=6, top_p=1)
    assert [other(logits).tolist() for _ in range(20)] != together
    picked = make(rows=3, size=64, allowed=64, seed=5, top_p=1)
    assert [picked(logits[:1], rows=[2]).tolist() for _ in range(20)] == [ids[2:] for ids in together]


def test_bfloat16_logits_are_accepted():
    assert make(temperature=0)(torch.arange(8.0).to(torch.bfloat16)[None]).tolist() == [7]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_of_a_diverged_model_are_refused(bad):
    logits = torch.zeros(1, 8)
    logits[0, 2] = bad
    with pytest.raises(CheckpointError, match="diverged"):
        make()(logits)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"max_length": 0}, "--max-length"),
        ({"temperature": -0.1}, "--temperature"),
        ({"temperature": math.nan}, "--temperature"),
        ({"temperature": math.inf}, "--temperature"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.01}, "--top-p"),
        ({"top_p": math.nan}, "--top-p"),
        ({"top_k": -1}, "--top-k"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_impossible_settings_name_their_flag(changes, flag):
    with pytest.raises(ConfigError, match=flag) as caught:
        Sampling.Config().override(changes)
    assert str(caught.value).startswith(next(iter(changes)))
