import pytest
import torch

from blues.errors import ConfigError
from blues.model.moe.routers import GroupLimited, SigmoidBias
from tests.model.moe.routers.examples import context, experts_of, make, tokens, weights_of


def skewed(config, **sizes):
    """A router that likes its first experts."""
    router = make(config, **sizes)
    x = tokens(512)
    x[:, 0] = 1.0
    with torch.no_grad():
        router.weight[:, 0] = torch.linspace(2, -2, router.num_experts)
        router.weight[:, 1:] /= 4
    return router, x


def test_the_choice_is_by_affinity_plus_bias_and_the_weight_by_affinity():
    router = make(SigmoidBias.Config(scale=2.5))
    router.bias_E.copy_(torch.linspace(-0.4, 0.4, 6))
    x = tokens()
    routing = router(x, context())
    for t in range(64):
        affinity = (x[t] @ router.weight.T).sigmoid().tolist()
        order = sorted(range(6), key=lambda e: -(affinity[e] + router.bias_E[e].item()))
        assert routing.ids_TK[t].tolist() == order[:2]
        chosen = [affinity[e] for e in order[:2]]
        assert routing.weights_TK[t].tolist() == pytest.approx([2.5 * a / sum(chosen) for a in chosen], rel=1e-5)
    assert experts_of(routing) != experts_of(make(SigmoidBias.Config())(x, context())), "the bias decided"


def test_a_single_expert_keeps_its_affinity_so_that_it_learns():
    routing = make(SigmoidBias.Config(), top_k=1)(tokens(), context())
    torch.testing.assert_close(routing.weights_TK, routing.logits_TE.sigmoid().gather(1, routing.ids_TK))


def test_the_bias_moves_by_one_step_against_the_load():
    router = make(SigmoidBias.Config(step=0.25))
    router.adapt(torch.tensor([10.0, 30.0, 20.0, 20.0, 0.0, 40.0]))
    assert router.bias_E.tolist() == [0.25, -0.25, 0.0, 0.0, 0.25, -0.25]


def test_statistics_are_the_tokens_of_each_expert():
    router = make(SigmoidBias.Config())
    routing = router(tokens(), context())
    assert router.statistics(routing).tolist() == torch.bincount(routing.ids_TK.flatten(), minlength=6).tolist()
    emptied = routing._replace(ids_TK=torch.full_like(routing.ids_TK, 6))
    assert not router.statistics(emptied).any(), "slots without an expert are nobody's load"


@pytest.mark.parametrize("config", [SigmoidBias.Config(step=0.004), GroupLimited.Config(step=0.004)])
def test_adapting_balances_the_load_of_a_skewed_router(config):
    router, x = skewed(config)
    violations = []
    for _ in range(400):
        with torch.no_grad():
            load = router.statistics(router(x, context(512)))
            router.adapt(load)
        violations.append((load.max() / load.mean() - 1).item())
    assert violations[0] > 1.0 and max(violations[-10:]) < 0.2


def naive_groups(scores, members, top_groups, top_k):
    groups = sorted(set(members))
    pairs = list(zip(scores, members, strict=True))
    inside = {group: sorted(-score for score, member in pairs if member == group) for group in groups}
    best = sorted(groups, key=lambda group: sum(inside[group][:2]))[:top_groups]
    allowed = [expert for expert in range(len(scores)) if members[expert] in best]
    return sorted(allowed, key=lambda expert: -scores[expert])[:top_k]


@pytest.mark.parametrize(
    ("num_experts", "num_groups", "top_groups", "members"),
    [
        (6, 3, 1, [0, 0, 1, 1, 2, 2]),
        (6, 3, 2, [0, 0, 1, 1, 2, 2]),
        (8, 2, 1, [0, 0, 0, 0, 1, 1, 1, 1]),
        (7, 3, 2, [0, 0, 0, 1, 1, 2, 2]),
    ],
)
def test_groups_are_chosen_by_their_two_best_and_experts_within(num_experts, num_groups, top_groups, members):
    config = GroupLimited.Config(num_groups=num_groups, top_groups=top_groups)
    router = make(config, num_experts=num_experts)
    router.bias_E.copy_(torch.linspace(0.1, -0.1, num_experts))
    x = tokens()
    routing = router(x, context())
    scores = (x @ router.weight.T).sigmoid() + router.bias_E
    for t in range(64):
        assert routing.ids_TK[t].tolist() == naive_groups(scores[t].tolist(), members, top_groups, 2)
        assert len({members[expert] for expert in routing.ids_TK[t].tolist()}) <= top_groups


def test_all_groups_are_no_limit():
    limited = make(GroupLimited.Config(num_groups=3, top_groups=3))(tokens(), context())
    free = make(SigmoidBias.Config())(tokens(), context())
    assert torch.equal(limited.ids_TK, free.ids_TK) and torch.equal(weights_of(limited), weights_of(free))


def test_groups_too_small_are_refused():
    with pytest.raises(ConfigError, match=r"top_groups: the smallest 1 of 6 groups of 6 experts hold 1"):
        make(GroupLimited.Config(num_groups=6))
    with pytest.raises(ConfigError, match=r"top_groups: the smallest 4 of 7 groups of 6 experts"):
        make(GroupLimited.Config(num_groups=7, top_groups=4))
    with pytest.raises(ConfigError, match="^top_groups: must be from 1 to num_groups"):
        GroupLimited.Config(num_groups=2, top_groups=3)
