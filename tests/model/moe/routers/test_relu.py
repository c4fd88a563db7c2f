import pytest
import torch

from blues.errors import ConfigError
from blues.model.moe.routers import ReLURouter
from tests.model.moe.routers.examples import context, experts_of, make, tokens, weights_of


def test_weights_are_the_positive_logits():
    router = make(ReLURouter.Config())
    x = tokens()
    routing = router(x, context())
    logits = x @ router.weight.T
    torch.testing.assert_close(weights_of(routing), logits.clamp(min=0))
    assert experts_of(routing) == [{e for e in range(6) if row[e] > 0} for row in logits.tolist()]


def test_the_penalty_is_the_load_balanced_mean_gate():
    router = make(ReLURouter.Config(first_strength=0.5))
    x = tokens()
    gates = (x @ router.weight.T).clamp(min=0)
    load = (gates > 0).sum(dim=0) * 6 / (2 * 64)
    expected = 0.5 * sum(load[e] * gates[t, e] for t in range(64) for e in range(6)) / 64
    penalty = router(x, context()).penalty
    torch.testing.assert_close(penalty, expected)
    penalty.backward()
    by_hand = sum(0.5 / 64 * load[e] * (gates[:, e] > 0).float() @ x * torch.eye(6)[e][:, None] for e in range(6))
    torch.testing.assert_close(router.weight.grad, by_hand, msg="the load itself has no gradient")


def test_the_strength_follows_the_sparsity():
    router = make(ReLURouter.Config(first_strength=0.1, growth=1.5))
    strengths = []
    for open_gates in (30.0, 10.0, 20.0):  # of 60; two of six is the target
        router.adapt(torch.tensor([open_gates, 60.0]))
        strengths.append(router.strength.item())
    assert strengths == pytest.approx([0.15, 0.1, 0.1])
    router.adapt(torch.tensor([10.0, 60.0]))
    assert router.strength.item() == pytest.approx(0.1), "never below the first"


def test_statistics_count_open_gates():
    router = make(ReLURouter.Config())
    routing = router(tokens(), context())
    assert router.statistics(routing).tolist() == [sum(map(len, experts_of(routing))), 64 * 6]


def test_the_penalty_holds_k_experts_a_token_against_a_loss_that_wants_all():
    router = make(ReLURouter.Config(first_strength=1e-3))
    x = torch.cat([torch.ones(256, 1), tokens(256)[:, 1:]], dim=1)  # a channel that can act as a bias
    optimizer = torch.optim.SGD(router.parameters(), lr=0.02)
    counts = []
    for _ in range(400):
        routing = router(x, context(256))
        (routing.penalty - routing.weights_TK.sum(dim=1).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            router.adapt(router.statistics(routing))
        counts.append(sum(map(len, experts_of(routing))) / 256)
    assert max(counts[:100]) > counts[0] > 2.5 and sum(counts[-100:]) / 100 == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize(("field", "value"), [("first_strength", 0.0), ("growth", 0.9)])
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"^{field}"):
        ReLURouter.Config(**{field: value})
