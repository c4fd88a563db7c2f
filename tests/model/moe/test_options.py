"""Shared experts, null experts and rules in the mixture layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from blues.errors import ConfigError
from blues.kernels.moe_experts import swiglu
from blues.model.compute import PAIRS
from blues.model.context import Context
from blues.model.losses import load_balancing_loss
from blues.model.moe.calibration import calibrate
from blues.model.moe.layer import MoE, mixtures
from blues.model.moe.null_experts import MoEPlusPlus, null_naive
from blues.model.moe.routers import GroupLimited, SigmoidBias, SoftmaxTopK
from blues.model.moe.routing import Routing
from blues.model.moe.rules import CapacityByPosition, ExpertDropout, SkipLight
from blues.model.moe.shared_experts import GatedShared, PlainShared
from tests.model.examples import gradients, lively, small
from tests.model.examples import tokens as token_ids

OPTIONS = {
    "shared": {"shared_experts": PlainShared.Config(number=2, ffn_dim=10)},
    "gated": {"shared_experts": GatedShared.Config()},
    "null": {"null_experts": MoEPlusPlus.Config(zero=1, copy=2, constant=2)},
    "skip": {"rules": (SkipLight.Config(beta=0.8, in_training=True),)},
    "capacity": {"rules": (CapacityByPosition.Config(factor=0.6),)},
    "dropout": {"rules": (ExpertDropout.Config(rate=0.7),)},
    "all": {
        "shared_experts": GatedShared.Config(),
        "null_experts": MoEPlusPlus.Config(),
        "rules": (SkipLight.Config(in_training=True), ExpertDropout.Config(), CapacityByPosition.Config(factor=1.0)),
    },
}
parametrized = pytest.mark.parametrize("name", OPTIONS)


def make(seed=0, **changes):
    config = MoE.Config(num_experts=4, top_k=2, ffn_dim=12, **changes)
    return config.build(dim=16, std=0.4, output_std=0.4, generator=torch.Generator().manual_seed(seed))


def inputs(n=30, dtype=torch.float32):
    x = torch.randn(2, n // 2, 16, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x, Context(torch.zeros(x.shape[:2], dtype=torch.int64))


def model_of(name, **changes):
    model = small(**changes)
    return lively(model.replace(moe=model.moe.replace(**OPTIONS[name])).build())


def test_without_options_the_layer_has_the_same_weights_and_bits():
    plain, more = make(), make(**OPTIONS["shared"])
    assert set(plain.state_dict()) == {
        "router.weight",
        "router.noise_weight",
        "experts.gate_up_EGD",
        "experts.down_EDF",
    }
    assert all(torch.equal(value, more.state_dict()[name]) for name, value in plain.state_dict().items())
    x, context = inputs()
    _, routing = plain.eval()(x, context)
    assert routing.decided is None and routing.pairs_P is None


@pytest.mark.parametrize("gated", [False, True])
def test_shared_experts_are_the_sum_of_separate_ones(gated):
    config = (GatedShared if gated else PlainShared).Config(number=3, ffn_dim=5)
    layer, (x, context) = make(shared_experts=config).double().eval(), inputs(dtype=torch.float64)
    y, _ = layer(x, context)
    shared = layer.shared_experts
    gates, ups = (part.split(5) for part in shared.experts.gate_up.weight.chunk(2))
    downs = shared.experts.down.weight.split(5, dim=1)
    alone = sum(
        F.linear(swiglu(F.linear(x, torch.cat([gate, up]))), down)
        for gate, up, down in zip(gates, ups, downs, strict=True)
    )
    if gated:
        alone = alone * torch.sigmoid(x @ shared.gate.weight.t())
    layer.shared_experts = None
    torch.testing.assert_close(y, layer(x, context)[0] + alone)


@pytest.mark.parametrize("counts", [(1, 1, 1), (2, 0, 0), (0, 2, 0), (0, 0, 3), (1, 2, 2)])
def test_null_experts_equal_the_naive_sum_forward_and_gradient(counts):
    config = MoEPlusPlus.Config(zero=counts[0], copy=counts[1], constant=counts[2])
    layer, (x, context) = make(null_experts=config).double(), inputs(dtype=torch.float64)
    x = x.flatten(0, 1).requires_grad_()
    routing = layer.router(x.detach(), context)
    routing = routing._replace(weights_TK=routing.weights_TK.detach().requires_grad_())
    assert (routing.ids_TK >= 4).any() and (routing.ids_TK < 4).any()
    given = [x, routing.weights_TK, *layer.null_experts.parameters()]
    fast, naive = layer.null_experts(x, routing), null_naive(x, routing, layer.null_experts)
    naive = naive + 0 * (x.sum() + routing.weights_TK.sum())  # zero experts alone have no gradient
    torch.testing.assert_close(fast, naive)
    grads = [torch.autograd.grad(y.square().sum(), given, allow_unused=True) for y in (fast, naive)]
    for a, b in zip(*grads, strict=True):
        assert (a is None or not a.any()) == (b is None or not b.any())
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)


def test_the_layer_with_null_experts_adds_both_kinds():
    layer, (x, context) = make(**OPTIONS["null"]).eval(), inputs()
    y, routing = layer(x, context)
    assert routing.probs_TE.shape[1] == 9
    flat = x.flatten(0, 1)
    torch.testing.assert_close(
        y.flatten(0, 1),
        layer.experts(flat, routing) + null_naive(flat, routing, layer.null_experts),
        atol=1e-5,
        rtol=1e-5,
    )
    counts = dict(zip(PAIRS, routing.pairs_P.tolist(), strict=True))
    assert counts["computed"] == (routing.ids_TK < 4).sum() and counts["null"] == (routing.ids_TK >= 4).sum() > 0


def test_the_balancing_loss_is_lowest_where_null_experts_have_their_share():
    null = make(null_experts=MoEPlusPlus.Config(tau=0.5)).null_experts
    weights, share = null.balance(torch.device("cpu")), torch.tensor(null.shares())
    assert share.sum().item() == pytest.approx(1) and share[0].item() == pytest.approx(0.5 * share[-1].item())

    def loss(at):
        probs = at.expand(5, -1)
        return load_balancing_loss(Routing(probs, probs.to(torch.int64), probs, probs), at, weights)

    assert loss(share).item() == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = (share + 0.05 * torch.rand(7, generator=generator)).div(1 + 0.05 * 3.5)
        assert loss(other / other.sum()) >= 1 - 1e-6


@parametrized
def test_every_parameter_has_a_gradient_and_checkpointing_changes_no_bit(name):
    results = []
    for on in (False, True):
        model = model_of(name, gradient_checkpointing=on)
        ids = token_ids(model)
        torch.manual_seed(5)
        output = model(ids[:, :-1], ids[:, 1:], progress=0.5)
        output.losses.total.backward()
        results.append((gradients(model), [r.pairs_P for r in output.routing]))
    (plain, counts), (saved, again) = results
    assert all(torch.equal(plain[key], saved[key]) for key in plain)
    for a, b in zip(counts, again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@parametrized
def test_counts_add_up(name):
    layer, (x, context) = make(**OPTIONS[name]).train(), inputs()
    torch.manual_seed(0)
    routing = layer(x, context)[1]
    if routing.pairs_P is None:
        assert not layer.is_conditional
        return
    chosen, *parts = routing.pairs_P.tolist()
    assert chosen == 60 == sum(parts) and routing.pairs_P.dtype == torch.int64
    assert routing.as_decided.ids_TK.max() < layer.router.num_experts
    assert len(parts) - parts.count(0) >= 2


@parametrized
def test_active_parameters_are_those_of_one_token(name):
    layer = make(**OPTIONS[name])
    one = 3 * 16 * 12
    outside = sum(p.numel() for n, p in layer.named_parameters() if not n.startswith("experts."))
    null = layer.null_experts
    share = 1.0 if null is None else 0.75 * 4 / (0.75 * 4 + null.config.number)
    assert sum(p.numel() for p in layer.parameters()) - layer.num_idle_parameters() == outside + round(2 * share * one)


def test_balancing_and_adaptation_go_by_what_the_router_decided():
    layer, (x, context) = make(router=SoftmaxTopK.Config(), rules=(CapacityByPosition.Config(factor=0.3),)), inputs()
    routing = layer(x, context)[1]
    bare = make(router=SoftmaxTopK.Config())(x, context)[1]
    assert (routing.ids_TK == 4).any() and torch.equal(routing.decided.ids_TK, bare.ids_TK)
    assert load_balancing_loss(routing) == load_balancing_loss(bare)


def test_statistics_of_router_and_rules_come_back_to_each():
    layer, (x, context) = make(router=SigmoidBias.Config(), rules=(SkipLight.Config(),)), inputs()
    sums = layer.statistics(layer(x, context)[1])
    assert len(sums) == 4 + 2
    layer.adapt(sums)
    assert layer.router.bias_E.any() and layer.rules[0].ratio > 0
    assert make().statistics(layer(x, context)[1]) is None


def test_layers_may_differ_in_their_experts():
    model = small(experts_per_layer=[3, 1])
    model = lively(model.replace(moe=model.moe.replace(**OPTIONS["all"])).build())
    ids = token_ids(model)
    output = model(ids[:, :-1], ids[:, 1:])
    output.losses.total.backward()
    gradients(model)
    assert [r.probs_TE.shape[1] for r in output.routing] == [6, 4]
    assert [moe.rules[0].applies for _, moe in mixtures(model)] == [True, False]


def test_calibration_finds_the_median_ratio_of_every_layer():
    config = small(moe__router="softmax_top_k")
    model = lively(config.replace(moe=config.moe.replace(rules=(SkipLight.Config(),))).build())
    batches = [token_ids(model, seed=seed) for seed in range(3)]
    betas = calibrate(model, batches)
    plain = lively(config.build()).eval()
    with torch.no_grad():
        routings = [plain(batch).routing for batch in batches]
    for layer, beta in enumerate(betas):
        weights = torch.cat([routing[layer].weights_TK for routing in routings])
        assert beta == pytest.approx((weights[:, 1] / weights[:, 0]).median().item())
    assert model.training
    skipped = model.eval()(batches[0]).routing[0].pairs_P.tolist()
    assert 0.3 < skipped[PAIRS.index("skipped")] * 2 / skipped[0] < 0.7


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("rules: skip_light drops", {"top_k": 1, "rules": (SkipLight.Config(),)}),
        ("rules", {"rules": (SkipLight.Config(), SkipLight.Config(beta=0.5))}),
        ("null_experts", {"router": GroupLimited.Config(), "null_experts": MoEPlusPlus.Config()}),
    ],
)
def test_wrong_combinations_are_refused_by_name(field, changes):
    with pytest.raises(ConfigError, match=f"^{field}"):
        MoE.Config(**changes)


def test_bad_settings_are_refused_by_name():
    for words, config in (
        ("^number", lambda: PlainShared.Config(number=0)),
        ("^zero", lambda: MoEPlusPlus.Config(zero=0, copy=0, constant=0)),
        ("^tau", lambda: MoEPlusPlus.Config(tau=0)),
    ):
        with pytest.raises(ConfigError, match=words):
            config()
