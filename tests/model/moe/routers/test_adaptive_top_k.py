import pytest
import torch

from blues.errors import ConfigError
from blues.model.moe.routers import AdaptiveTopK
from tests.model.moe.routers.examples import context, experts_of, make, tokens, weights_of


def fewest(probs, p, most):
    chosen, total = [], 0.0
    for expert in sorted(range(len(probs)), key=lambda e: -probs[e]):
        if len(chosen) == most or (chosen and total >= p):
            break
        chosen.append(expert)
        total += probs[expert]
    return set(chosen)


@pytest.mark.parametrize(("p", "most"), [(0.3, None), (0.7, None), (0.7, 2), (1.0, None), (0.9, 50)])
def test_a_token_gets_the_fewest_experts_that_reach_p(p, most):
    router = make(AdaptiveTopK.Config(p=p, max_experts=most))
    x = tokens(dtype=torch.float64)
    routing = router.double()(x, context())
    probs = (x @ router.weight.T).softmax(dim=-1)
    assert experts_of(routing) == [fewest(row, p, min(most or 6, 6)) for row in probs.tolist()]
    torch.testing.assert_close(weights_of(routing), probs * (weights_of(routing) > 0))
    assert routing.ids_TK.shape[1] == min(most or 6, 6)


def test_certain_tokens_get_one_expert_and_undecided_ones_many():
    router = make(AdaptiveTopK.Config(p=0.6))
    x = torch.cat([tokens(32) * 20, tokens(32) / 20])
    counts = list(map(len, experts_of(router(x, context()))))
    assert sum(counts[:32]) / 32 < 1.2 and min(counts[32:]) == 4


def test_the_penalty_is_the_mean_entropy():
    router = make(AdaptiveTopK.Config(entropy_weight=0.5))
    probs = (tokens() @ router.weight.T).softmax(dim=-1)
    torch.testing.assert_close(router(tokens(), context()).penalty, -0.5 * (probs * probs.log()).sum(-1).mean())
    assert make(AdaptiveTopK.Config(entropy_weight=0.0))(tokens(), context()).penalty is None


@pytest.mark.parametrize(
    ("field", "values"),
    [("p", {"p": 0.0}), ("max_experts", {"max_experts": 0}), ("entropy_weight", {"entropy_weight": -1.0})],
)
def test_bad_settings_are_refused_by_name(field, values):
    with pytest.raises(ConfigError, match=f"^{field}"):
        AdaptiveTopK.Config(**values)
