"""Expert choice and expert threshold routing: thresholds that follow each expert's cut-off."""

import pytest
import torch

from blues.errors import ConfigError
from blues.model.moe.routers import ExpertChoice, ExpertThreshold
from tests.model.moe.routers.examples import context, experts_of, make, tokens, weights_of

pytestmark = pytest.mark.filterwarnings("ignore:moe.router=expert_choice")
BOTH = [ExpertChoice, ExpertThreshold]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_each_expert_takes_its_best_tokens_in_training(top_k):
    router = make(ExpertChoice.Config(), top_k=top_k)
    x = tokens(60)
    routing = router(x, context(60))
    probs = (x @ router.weight.T).softmax(dim=-1)
    chosen = experts_of(routing)
    for expert in range(6):
        best = sorted(range(60), key=lambda t: -probs[t, expert].item())[: 10 * top_k]
        assert {t for t in range(60) if expert in chosen[t]} == set(best)
        for t in best:
            assert weights_of(routing)[t, expert].item() == pytest.approx(probs[t, expert].item())


def test_a_later_token_takes_an_earlier_one_s_place_in_training_only():
    router = make(ExpertChoice.Config())
    x, given = tokens(60), context(60)
    changed = x.clone()
    changed[40:] *= 5
    assert experts_of(router(x, given))[:40] != experts_of(router(changed, given))[:40]
    router.eval()
    assert experts_of(router(x, given))[:40] == experts_of(router(changed, given))[:40]


def test_expert_choice_warns_when_it_is_built():
    with pytest.warns(UserWarning, match="expert_choice sees later tokens of a sequence in training and is not causal"):
        make(ExpertChoice.Config())


def test_a_token_goes_to_the_experts_whose_threshold_it_passes():
    router = make(ExpertThreshold.Config())
    router.threshold_E.copy_(torch.linspace(-1, 1, 6))
    x = tokens()
    for training in (True, False):
        routing = router.train(training)(x, context())
        logits = x @ router.weight.T
        assert experts_of(routing) == [{e for e in range(6) if row[e] > router.threshold_E[e]} for row in logits]
        torch.testing.assert_close(weights_of(routing), logits.sigmoid() * (logits > router.threshold_E))
    assert len({len(chosen) for chosen in experts_of(routing)}) > 2, "tokens have different numbers of experts"


@pytest.mark.parametrize("router_class", BOTH)
def test_the_threshold_is_a_moving_average_of_cut_offs(router_class):
    router = make(router_class.Config(decay=0.75))
    batches = [tokens(60, seed=seed) for seed in range(3)]
    with torch.no_grad():
        routings = [router(x, context(60)) for x in batches]
        cutoffs = [router.scores(routing).sort(dim=0, descending=True).values[19] for routing in routings]
        router.adapt(router.statistics(routings[0]))
        torch.testing.assert_close(router.threshold_E, cutoffs[0], msg="the first update sets it")
        router.adapt(router.statistics(routings[1]) + router.statistics(routings[2]))
    torch.testing.assert_close(router.threshold_E, 0.75 * cutoffs[0] + 0.25 * (cutoffs[1] + cutoffs[2]) / 2)


@pytest.mark.parametrize("router_class", BOTH)
def test_thresholds_give_every_expert_its_share_of_new_tokens(router_class):
    router = make(router_class.Config(decay=0.9))
    with torch.no_grad():
        router.weight[0] *= 3  # an expert with much larger logits
        for seed in range(40):
            router.adapt(router.statistics(router(tokens(256, seed=seed), context(256))))
        routing = router.eval()(tokens(6000, seed=99), context(6000))
    load = (weights_of(routing) > 0).float().mean(dim=0)
    torch.testing.assert_close(load, torch.full((6,), 2 / 6), atol=0.03, rtol=0)


def test_a_decay_that_forgets_nothing_is_refused():
    with pytest.raises(ConfigError, match="^decay"):
        ExpertThreshold.Config(decay=1.0)
