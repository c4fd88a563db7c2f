"""Experts switched off while training: the schedule, the mask, coming back, and what is left afterwards."""

from __future__ import annotations

import pytest
import torch

from blues.errors import ConfigError
from blues.model.moe.layer import mixtures
from blues.model.moe.pruning import apply_recipe
from blues.model.moe.rules import RandomRegrowth, SkipLight, SwitchOff
from tests.model.examples import gradients, lively, small, tokens
from tests.model.moe.pruning.examples import batch, recipe

RULE = SwitchOff.Config(share=0.5, start=2, until=6, every=2)


def model(rule=RULE, **changes):
    built = small(moe__num_experts=8, **changes)
    return lively(built.replace(moe=built.moe.replace(rules=(rule,))).build())


def advance(of, updates):
    """As the trainer does: statistics of a forward, then `adapt`."""
    ids = tokens(of)
    with torch.no_grad():
        for _ in range(updates):
            torch.manual_seed(
                int(mixtures(of)[0][1].rules[0].updates)
            )  # the noise of an update follows from its number
            for (_, moe), routing in zip(mixtures(of), of(ids).routing, strict=True):
                moe.adapt(moe.statistics(routing))


def off(of):
    return [moe.router.off_E.nonzero()[:, 0].tolist() for _, moe in mixtures(of)]


def test_the_share_rises_on_schedule_and_then_stays():
    of, numbers = model(), []
    for _ in range(9):
        advance(of, 1)
        numbers.append(len(off(of)[0]))
    # The cubic over changes at 2, 4, 6: 0.5 * (1 - (2/3)^3, 1 - (1/3)^3, 1) of 8.
    assert numbers == [0, 3, 3, 4, 4, 4, 4, 4, 4]


def test_the_least_used_go():
    of = model()
    (_, moe), *_ = mixtures(of)
    counts_E = torch.tensor([5.0, 0, 9, 1, 7, 7, 7, 7])
    moe.adapt(counts_E)
    moe.adapt(counts_E)
    assert off(of)[0] == [0, 1, 3]


@pytest.mark.parametrize("router", SwitchOff.fits)
def test_closed_experts_get_no_token_and_gradients_stay_numbers(router):
    of = model(moe__router=router)
    advance(of, 6)
    ids = tokens(of)
    for training in (True, False):
        output = of.train(training)(ids, ids)
        for closed, routing in zip(off(of), output.routing, strict=True):
            assert closed and not torch.isin(routing.ids_TK, torch.tensor(closed)).any()
    of.train()(ids, ids).losses.total.backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(of).values())
    for closed, (_, moe) in zip(off(of), mixtures(of), strict=True):
        assert not moe.router.weight.grad[closed].any() and not moe.experts.down_EDF.grad[closed].any()


def test_some_come_back_for_others():
    of = model(RULE.replace(until=40, regrowth=RandomRegrowth.Config(count=1)))
    advance(of, 20)
    before = off(of)
    advance(of, 20)
    assert [len(each) for each in off(of)] == [4, 4] and off(of) != before


def test_a_state_that_was_saved_goes_on_as_if_nothing_had_been():
    rule = RULE.replace(until=20, regrowth=RandomRegrowth.Config())
    unbroken, first = model(rule), model(rule)
    advance(unbroken, 13)
    advance(first, 7)
    second = model(rule)
    second.load_state_dict(first.state_dict())
    advance(second, 6)
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_what_is_off_can_be_taken_away_and_changes_nothing():
    of = model()
    advance(of, 6)
    of.eval()
    made = recipe(of, criterion="alive", keep=8)
    smaller = apply_recipe(of, made)
    assert smaller.config.moe.num_experts == 4 and smaller.config.moe.rules == ()
    assert [plan.gone for plan in made.layers] == [tuple(each) for each in off(of)]
    ids = batch(of).inputs
    torch.testing.assert_close(smaller(ids).logits_BTV, of(ids).logits_BTV, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="would wake it"):
        apply_recipe(of, recipe(of, action="merge", keep=4))
    with pytest.raises(ConfigError, match="would wake it"):
        apply_recipe(of, recipe(of, criterion="man", keep=7))


def test_other_rules_stay_when_the_schedule_goes():
    built = small(moe__num_experts=8)
    of = lively(built.replace(moe=built.moe.replace(rules=(RULE, SkipLight.Config()))).build())
    advance(of, 6)
    smaller = apply_recipe(of.eval(), recipe(of, criterion="alive", keep=8))
    assert [type(rule) for rule in smaller.config.moe.rules] == [SkipLight.Config]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"share": 1.0}, "share"), ({"start": 0}, "start"), ({"start": 7}, "start"), ({"every": 0}, "every")],
)
def test_settings_that_cannot_be_are_refused(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        RULE.replace(**change)
    with pytest.raises(ConfigError, match="does not fit moe.router=relu"):
        model(moe__router="relu")
