"""Parameter groups, and the shape of every schedule."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blues.config import load
from blues.errors import ConfigError
from blues.training.optim import (
    AdamW,
    Constant,
    Cosine,
    Linear,
    Optimizer,
    Schedule,
    WarmupStableDecay,
    parameter_groups,
)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.matrix = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)


def test_matrices_decay_and_gains_biases_embeddings_do_not():
    model = Small()
    decayed, free = parameter_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model.matrix.weight)]
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in free["params"]} == {"embedding.weight", "matrix.bias", "norm.weight", "norm.bias"}


def test_adamw_is_torchs_with_the_configured_values():
    optimizer = AdamW.Config(lr=0.01, betas=(0.8, 0.9), eps=1e-6).build().make(Small())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.8, 0.9) and optimizer.defaults["eps"] == 1e-6
    assert all(group["lr"] == 0.01 for group in optimizer.param_groups)


def test_state_names_are_what_the_optimizer_keeps():
    model = Small()
    recipe = AdamW.Config().build()
    optimizer = recipe.make(model)
    model.matrix(torch.ones(3)).sum().backward()
    optimizer.step()
    state = optimizer.state[model.matrix.weight]
    assert {name for name, value in state.items() if value.shape == model.matrix.weight.shape} == set(
        recipe.state_names
    )


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: AdamW.Config(lr=0.0), "lr"),
        (lambda: AdamW.Config(weight_decay=-1.0), "weight_decay"),
        (lambda: AdamW.Config(betas=(0.9, 1.0)), "betas"),
        (lambda: AdamW.Config(betas=(0.9,)), "betas"),
        (lambda: AdamW.Config(eps=0.0), "eps"),
        (lambda: Cosine.Config(warmup_steps=-1), "warmup_steps"),
        (lambda: Cosine.Config(final_fraction=1.5), "final_fraction"),
        (lambda: WarmupStableDecay.Config(decay_fraction=0.0), "decay_fraction"),
        (lambda: load(Optimizer.Config, {"variant": "adam"}), "adamw"),
    ],
)
def test_bad_values_name_the_field(make, word):
    with pytest.raises(ConfigError, match=word):
        make()


def test_warm_up_is_linear_and_reaches_the_peak():
    schedule = Cosine.Config(warmup_steps=4).build(total_steps=20)
    assert [schedule.factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule.factor(4) == 1.0


@pytest.mark.parametrize("kind", [Linear, Cosine, WarmupStableDecay])
def test_the_last_step_is_at_the_final_fraction(kind):
    schedule = kind.Config(warmup_steps=3, final_fraction=0.2).build(total_steps=50)
    assert schedule.factor(49) == pytest.approx(0.2)


def test_known_values():
    options = {"warmup_steps": 0, "final_fraction": 0.0}
    assert Constant.Config(**options).build(total_steps=11).factor(10) == 1.0
    assert Linear.Config(**options).build(total_steps=11).factor(5) == pytest.approx(0.5)
    assert Cosine.Config(**options).build(total_steps=13).factor(4) == pytest.approx((1 + math.cos(math.pi / 3)) / 2)
    stable = WarmupStableDecay.Config(decay_fraction=0.4, **options).build(total_steps=11)
    assert stable.factor(6) == 1.0 and stable.factor(7) == pytest.approx(1 - math.sqrt(0.25))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(Schedule.variants)),
    total=st.integers(1, 300),
    warmup=st.integers(0, 400),
    final=st.floats(0, 1),
)
def test_factors_rise_to_one_and_never_rise_again(kind, total, warmup, final):
    schedule = Schedule.variants[kind].Config(warmup_steps=warmup, final_fraction=final).build(total_steps=total)
    factors = [schedule.factor(step) for step in range(total)]
    assert all(0 <= factor <= 1 + 1e-12 for factor in factors)
    peak = min(warmup, total)
    assert factors[:peak] == sorted(factors[:peak])
    after = factors[peak:]
    assert all(later <= earlier + 1e-12 for earlier, later in zip(after, after[1:], strict=False))
