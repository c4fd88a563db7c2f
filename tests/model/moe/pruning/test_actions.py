"""Smaller layers: what stays the same, what is averaged, what is refused."""

from __future__ import annotations

import pytest
import torch

from blues.errors import ConfigError
from blues.model.moe.layer import mixtures
from blues.model.moe.pruning import Action, LayerPlan, Recipe, apply_recipe, calibrate
from blues.model.moe.pruning.actions import clusters
from blues.model.moe.pruning.calibration import expert_outputs
from blues.model.moe.pruning.rows import merge_experts
from blues.model.moe.routing import Router
from tests.model.examples import gradients, tokens
from tests.model.moe.pruning.examples import batch, model, recipe

ACTIONS = sorted(Action.variants)
BY_CHOSEN = ["language_aware", "noisy_top_k", "sigmoid_bias", "softmax_top_k"]
REMOVABLE = [name for name in sorted(Router.variants) if name not in ("hash", "group_limited", "document_pools")]


def removal(of, kept) -> Recipe:
    plans = tuple(
        LayerPlan(layer=layer, num_experts=moe.experts.num_experts, scores=(0.0,) * moe.experts.num_experts, kept=kept)
        for layer, moe in mixtures(of)
    )
    return Recipe(checkpoint="0", layers=plans)


@pytest.mark.parametrize("router", BY_CHOSEN)
@torch.no_grad()
def test_removing_unused_experts_leaves_every_bit(router):
    """Few tokens cannot use all eight experts; where weights depend on the chosen ones alone, nothing changes."""
    of = model(moe__router=router, moe__num_experts=8)
    ids = tokens(of, batch=1, length=2)
    output = of(ids)
    plans = []
    for (layer, _), routing in zip(mixtures(of), output.routing, strict=True):
        used = {expert for expert in routing.ids_TK.flatten().tolist() if expert < 8}
        spare = [expert for expert in range(8) if expert not in used]
        kept = tuple(sorted([*used, *spare][:4]))  # products of 8 and of 4 columns round alike; of 5 they need not
        assert used <= set(kept)
        plans.append(LayerPlan(layer=layer, num_experts=8, scores=(0.0,) * 8, kept=kept))
    smaller = apply_recipe(of, Recipe(checkpoint="0", layers=tuple(plans)))
    assert torch.equal(output.logits_BTV, smaller(ids).logits_BTV)
    assert smaller.config.experts_per_layer is None and smaller.config.moe.num_experts == 4


@pytest.mark.parametrize("router", sorted(set(REMOVABLE) - set(BY_CHOSEN)))
@pytest.mark.filterwarnings("ignore:moe.router=expert_choice")
def test_other_routers_lose_experts_too(router):
    of = model(moe__router=router)
    smaller = apply_recipe(of, removal(of, (1, 3)))
    assert torch.isfinite(smaller(tokens(of)).logits_BTV).all()
    for (_, before), (_, after) in zip(mixtures(of), mixtures(smaller), strict=True):
        assert torch.equal(after.router.weight, before.router.weight[[1, 3]])


@pytest.mark.parametrize("router", ["hash", "group_limited", "document_pools"])
def test_routers_that_cannot_lose_an_expert_say_why_and_others_can_merge(router):
    of = model(moe__router=router)
    with pytest.raises(ConfigError, match=f"{router}: experts cannot be removed"):
        apply_recipe(of, removal(of, (0, 1)))
    assert torch.isfinite(apply_recipe(of, recipe(of, action="merge"))(tokens(of)).logits_BTV).all()


@torch.no_grad()
def test_mean_output_is_the_mean_over_the_experts_own_tokens():
    of, plan = model(), None
    one = batch(of)
    plans = recipe(of, action="mean_output").layers
    smaller = apply_recipe(of, recipe(of, action="mean_output"))
    statistics = calibrate(of, [one])
    for plan, found, (_, moe) in zip(plans, statistics, mixtures(smaller), strict=True):
        for place, expert in enumerate(plan.gone):
            mean_D = (found.output_ED[expert] / found.count_E[expert]).float()
            assert torch.equal(moe.redirect.constant_ND[place], mean_D)
            assert int(moe.redirect.target_R[expert]) == len(plan.kept) + place
    # The layer by its definition: kept experts as they were, constants for the others.
    (_, before), (_, after) = mixtures(of)[0], mixtures(smaller)[0]
    context = torch.randn(5, 32)
    seen = type("Seen", (), {"tokens_BT": torch.zeros(1, 5, dtype=torch.long), "progress": 1.0})()
    y_BTD, routing = after(context[None], seen)
    outputs_TED = expert_outputs(before.experts, context)
    for place, expert in enumerate(plans[0].gone):
        outputs_TED[:, expert] = after.redirect.constant_ND[place]
    weight_TE = torch.zeros(5, 4).scatter_add(1, routing.ids_TK, routing.weights_TK)
    torch.testing.assert_close(y_BTD[0], torch.einsum("te,ted->td", weight_TE, outputs_TED), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_merging_is_the_weighted_mean_after_alignment():
    torch.manual_seed(0)
    gate_up_GD, down_DF = torch.randn(10, 6), torch.randn(6, 5)
    order = torch.randperm(5)
    shuffled_GD = torch.cat([half[order] for half in gate_up_GD.chunk(2)])
    pair = torch.stack([gate_up_GD, shuffled_GD]), torch.stack([down_DF, down_DF[:, order]])
    merged = merge_experts(*pair, members=[0, 1], shares=[0.25, 0.75], align=True)
    torch.testing.assert_close(merged, (gate_up_GD, down_DF))  # the same expert in another order: nothing is lost
    crude = merge_experts(*pair, members=[0, 1], shares=[0.25, 0.75], align=False)
    torch.testing.assert_close(crude[1], 0.25 * pair[1][0] + 0.75 * pair[1][1])
    alone = merge_experts(*pair, members=[1], shares=[1.0], align=True)
    assert torch.equal(alone[0], shuffled_GD)


def test_merged_groups_go_by_logits_and_frequency():
    of = model()
    (plan, *_), (found, *_) = recipe(of, action="merge").layers, calibrate(of, [batch(of)])
    for expert in plan.gone:
        cosine = [
            float(found.logits_EE[expert, k] / (found.logits_EE[expert, expert] * found.logits_EE[k, k]).sqrt())
            for k in plan.kept
        ]
        assert plan.targets[expert] == cosine.index(max(cosine))
    for place in range(len(plan.kept)):
        group = [expert for expert, target in enumerate(plan.targets) if target == place]
        total = sum(float(found.count_E[expert]) for expert in group)
        assert [plan.shares[e] for e in group] == pytest.approx([float(found.count_E[e]) / total for e in group])


def test_clusters_of_like_outputs():
    import numpy as np

    labels = clusters(np.array([[0.0, 0], [5, 5], [0.1, 0], [5, 5.2]]), 2)
    assert labels[0] == labels[2] != labels[1] == labels[3]
    of = model()
    for plan in recipe(of, action="cluster").layers:
        assert len(plan.kept) == 2 and all(plan.targets[kept] == place for place, kept in enumerate(plan.kept))


@pytest.mark.parametrize("action", ACTIONS)
def test_pruned_models_train_and_say_what_they_cost(action):
    of = model()
    smaller = apply_recipe(of, recipe(of, action=action))
    assert smaller.num_parameters() < of.num_parameters()
    assert smaller.flops_per_token(16) <= of.flops_per_token(16) * 1.01
    ids = tokens(of)
    smaller.train()(ids, ids).losses.total.backward()
    gradients(smaller)
    rebuilt = smaller.config.build()
    rebuilt.load_state_dict(smaller.state_dict())
    torch.testing.assert_close(rebuilt.eval()(ids).logits_BTV, smaller.eval()(ids).logits_BTV, rtol=0, atol=0)


@pytest.mark.parametrize("action", ["merge", "mean_output", "cluster"])
def test_what_was_merged_is_not_pruned_again(action):
    smaller = apply_recipe(model(), recipe(model(), action=action))
    with pytest.raises(ConfigError, match="merged or replaced"):
        recipe(smaller)


def test_removing_twice_and_keeping_all():
    of = model()
    once = apply_recipe(of, recipe(of, keep=3))
    twice = apply_recipe(once, recipe(once, keep=2))
    assert twice.config.moe.num_experts == 2
    ids = tokens(of)
    for action in ACTIONS:
        same = apply_recipe(of, recipe(of, action=action, keep=4))
        assert torch.equal(same(ids).logits_BTV, of(ids).logits_BTV)


def test_layers_may_keep_different_numbers():
    of = model()
    uneven = recipe(of, criterion="ean", ratio=0.25, scope="global")
    assert sum(len(plan.kept) for plan in uneven.layers) == 6
    first, second = recipe(of).layers
    plans = (LayerPlan(layer=1, num_experts=4, scores=first.scores, kept=(0, 1, 2, 3)), second)
    smaller = apply_recipe(of, Recipe(checkpoint="0", layers=plans))
    assert smaller.config.experts_per_layer == (4, 2)
