"""Every criterion against loops over tokens and experts that say what it is."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from blues.data.mixture.packing import IGNORED
from blues.errors import ConfigError
from blues.model.moe.layer import mixtures
from blues.model.moe.pruning import Budget, Criterion, calibrate, plan_layers, subset_sizes
from blues.model.moe.pruning.actions import Remove
from tests.model.moe.pruning.examples import batch, model


@pytest.fixture(scope="module")
def subject():
    return model()


def layer_inputs(of, one):
    """`(layer, moe, x_TD, routing)` of the tokens that count."""
    seen = []
    handles = [
        moe.register_forward_hook(lambda moe, inputs, output: seen.append((inputs[0].flatten(0, 1), output[1])))
        for _, moe in mixtures(of)
    ]
    with torch.no_grad():
        of.hidden(one.inputs)
    for handle in handles:
        handle.remove()
    counted = (one.targets != IGNORED).flatten()
    for (layer, moe), (x_TD, routing) in zip(mixtures(of), seen, strict=True):
        yield layer, moe, x_TD[counted], routing.ids_TK[counted], routing.weights_TK[counted]


def output_of(moe, expert, x_D):
    gate_D, up_D = (moe.experts.gate_up_EGD[expert] @ x_D).chunk(2)
    return moe.experts.down_EDF[expert] @ (F.silu(gate_D) * up_D)


def naive(name, moe, x_TD, ids_TK, weights_TK):
    """The definitions, token by token."""
    scores = []
    for expert in range(moe.experts.num_experts):
        gates, norms = [], []
        for x_D, ids_K, weights_K in zip(x_TD, ids_TK.tolist(), weights_TK, strict=True):
            if expert in ids_K:
                gates.append(float(weights_K[ids_K.index(expert)] / weights_K.sum()))
                norms.append(float(output_of(moe, expert, x_D).norm()))
        pairs, routed = list(zip(gates, norms, strict=True)), max(1, len(gates))
        w_N = torch.cat([moe.experts.gate_up_EGD[expert].flatten(), moe.experts.down_EDF[expert].flatten()])
        scores.append(
            {
                "frequency": len(gates),
                "gate_mass": sum(gates),
                "ean": sum(norms),
                "reap": sum(g * n for g, n in pairs) / routed,
                "man": sum(norms) / routed,
                "msan": sum(n * n for n in norms) / routed,
                "aimer": -float(w_N.abs().mean() / w_N.square().mean().sqrt()),
            }[name]
        )
    return scores


@pytest.mark.parametrize("name", ["frequency", "gate_mass", "ean", "reap", "man", "msan", "aimer"])
@torch.no_grad()
def test_scores_are_what_their_papers_say(name, subject):
    one = batch(subject)
    criterion = Criterion.variants[name].Config().build()
    statistics = calibrate(subject, [one._replace(inputs=i, targets=t) for i, t in halves(one)])
    for found, (_, moe, *rest) in zip(statistics, layer_inputs(subject, one), strict=True):
        scores_E = criterion.scores(found, moe)
        assert scores_E.tolist() == pytest.approx(naive(name, moe, *rest), rel=1e-5)
        best = sorted(range(4), key=lambda expert: -float(scores_E[expert]))[:2]
        assert criterion.keep(found, scores_E, 2) == tuple(sorted(best))


def halves(one):
    return zip(one.inputs.chunk(2), one.targets.chunk(2), strict=True)


@torch.no_grad()
def test_subset_search_is_exact(subject):
    one, criterion = batch(subject), Criterion.variants["naee"].Config().build()
    budget = Budget(keep=2)
    sizes = subset_sizes(subject, criterion, budget)
    statistics = calibrate(subject, [one], subset_sizes=sizes)
    plans = plan_layers(subject, statistics, criterion, Remove.Config().build(), budget)
    for plan, (_, moe, x_TD, ids_TK, weights_TK) in zip(plans, layer_inputs(subject, one), strict=True):
        errors = {}
        for subset in itertools.combinations(range(4), 2):
            error = 0.0
            for x_D, ids_K, weights_K in zip(x_TD, ids_TK.tolist(), weights_TK, strict=True):
                whole_D = sum(w * output_of(moe, e, x_D) for e, w in zip(ids_K, weights_K, strict=True))
                share_2 = (moe.router.weight[list(subset)] @ x_D).softmax(dim=0)  # top_k is 2: both are taken
                own_D = sum(w * output_of(moe, e, x_D) for e, w in zip(subset, share_2, strict=True))
                error += float((own_D - whole_D).square().sum())
            errors[subset] = error
        assert plan.kept == min(errors, key=errors.get)
        root = {subset: (error / len(x_TD)) ** 0.5 for subset, error in errors.items()}
        for expert, score in enumerate(plan.scores):
            without = min(value for subset, value in root.items() if expert not in subset)
            with_it = min(value for subset, value in root.items() if expert in subset)
            assert score == pytest.approx(without - with_it, rel=1e-4, abs=1e-6)


def test_too_many_subsets_and_a_global_budget_are_refused(subject):
    naee = Criterion.variants["naee"]
    with pytest.raises(ConfigError, match=r"2 of 4 experts are 6 subsets"):
        subset_sizes(subject, naee.Config(max_subsets=5).build(), Budget(keep=2))
    with pytest.raises(ConfigError, match="--scope layer"):
        subset_sizes(subject, naee.Config().build(), Budget(keep=2, scope="global"))
    with pytest.raises(ConfigError, match="max_subsets"):
        naee.Config(max_subsets=0)


def test_padding_and_nothing_at_all(subject):
    one = batch(subject)
    assert calibrate(subject, [one])[0].tokens == 4 * 12 - 3
    with pytest.raises(ConfigError, match="no tokens"):
        calibrate(subject, [])
    with pytest.raises(ConfigError, match="no mixture layer"):
        calibrate(model(moe=None), [one])


def test_budgets():
    assert Budget(keep=3).per_layer([4, 8], [2, 2]) == [3, 3]
    assert Budget(ratio=0.5).per_layer([4, 8], [2, 2]) == [2, 4]
    even, uneven = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([10.0, 0.1, 0.1, 0.1])
    assert Budget(ratio=0.25, scope="global").over_layers([even, uneven], [1, 1]) == [4, 2]
    for bad, sentence in [
        ({}, "--keep"),
        ({"keep": 2, "ratio": 0.5}, "--keep"),
        ({"keep": 0}, "at least 1"),
        ({"ratio": 1.0}, "below 1"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            Budget(**bad)
    with pytest.raises(ConfigError, match="top_k"):
        Budget(keep=1).per_layer([4], [2])
    with pytest.raises(ConfigError, match="cannot stay"):
        Budget(keep=5).per_layer([4], [2])
    with pytest.raises(ConfigError, match="below 0"):
        Budget(keep=1, scope="global").over_layers([-even], [1])
