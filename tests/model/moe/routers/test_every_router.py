"""What holds for every registered router."""

from __future__ import annotations

import warnings

import pytest
import torch

from blues.inference.cache import Cache
from blues.model.moe.routing import LinearRouter, Router
from tests.model.examples import gradients, lively, small
from tests.model.examples import tokens as token_ids
from tests.model.moe.routers.examples import VARIANTS, context, make, tokens, weights_of

pytestmark = [
    pytest.mark.parametrize("variant", VARIANTS),
    pytest.mark.filterwarnings("ignore:moe.router=expert_choice"),
]


def build(variant, **sizes):
    return make(Router.variants[variant].Config(), **sizes)


def model_of(variant, **changes):
    return lively(small(moe__router=variant, **changes).build())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_routing_is_distinct_experts_and_empty_slots_in_float32(variant, training, dtype):
    router = build(variant).to(dtype).train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        routing = router(tokens(dtype=dtype), context())
    weights, ids, probs, logits, penalty = routing[:5]
    assert weights.dtype == probs.dtype == logits.dtype == torch.float32 and ids.dtype == torch.int64
    assert probs.shape == logits.shape == (64, 6) and weights.shape == ids.shape
    assert bool(((ids >= 0) & (ids <= 6)).all()) and not weights[ids == 6].any() and bool((weights >= 0).all())
    for row in ids.tolist():
        used = [expert for expert in row if expert < 6]
        assert len(set(used)) == len(used)
    assert logits.isfinite().all() and weights.isfinite().all()
    total = probs.sum(dim=-1)
    assert bool(((total - 1).abs().lt(1e-5) | (total == 0)).all())
    assert penalty is None or (penalty.ndim == 0 and penalty.dtype == torch.float32 and penalty >= 0)


@pytest.mark.parametrize("num_experts", [3, 5, 8])
def test_any_number_of_experts_will_do(variant, num_experts):
    router = build(variant, num_experts=num_experts, top_k=1)
    assert router(tokens(), context()).probs_TE.shape == (64, num_experts)


def test_the_language_loss_reaches_the_router(variant):
    router = build(variant)
    weights = weights_of(router(tokens(), context()))
    parameters = list(router.parameters())
    assert bool(parameters) == isinstance(router, LinearRouter)
    if parameters:
        (weights * torch.linspace(-1, 1, 6)).sum().backward()
        assert router.weight.grad.abs().sum() > 0


def test_evaluation_looks_at_no_later_token(variant):
    router = build(variant).eval()
    x, given = tokens(), context(rows=2)
    later = x.clone().unflatten(0, (2, 32))
    later[:, 20:] = tokens(seed=9).unflatten(0, (2, 32))[:, 20:]
    first, second = (weights_of(router(t, given)).unflatten(0, (2, 32)) for t in (x, later.flatten(0, 1)))
    torch.testing.assert_close(first[:, :20], second[:, :20], atol=0, rtol=0)


def test_buffers_are_never_rounded(variant):
    router = build(variant)
    with torch.no_grad():
        for buffer in router.buffers():
            if buffer.is_floating_point():
                buffer.fill_(1.00390625001)
    before = {name: buffer.clone() for name, buffer in router.named_buffers()}
    router.bfloat16()
    assert all(parameter.dtype == torch.bfloat16 for parameter in router.parameters())
    for name, buffer in router.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])
    assert set(before) <= set(router.state_dict())


def test_statistics_have_one_size_and_add_up(variant):
    router = build(variant)
    with torch.no_grad():
        sums = [router.statistics(router(tokens(n), context(n))) for n in (16, 64)]
    if sums[0] is None:
        assert sums[1] is None and not list(router.buffers())
        return
    assert sums[0].dtype == torch.float32 and sums[0].shape == sums[1].shape
    before = {name: buffer.clone() for name, buffer in router.named_buffers()}
    with torch.no_grad():
        router.adapt(sums[0] + sums[1])
    assert any(not torch.equal(buffer, before[name]) for name, buffer in router.named_buffers())


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_every_parameter_has_a_gradient_and_dispatches_agree(variant, gradient_checkpointing):
    ids, results = token_ids(small().build()), []
    for dispatch in ("naive", "sorted", "grouped_mm", "grouped_mm_trimmed"):
        model = model_of(variant, moe__dispatch=dispatch, gradient_checkpointing=gradient_checkpointing)
        torch.manual_seed(5)
        output = model(ids[:, :-1], ids[:, 1:], progress=0.5)
        output.losses.total.backward()
        results.append((output.losses.total, gradients(model)))
    for total, grads in results[1:]:
        torch.testing.assert_close(total, results[0][0], atol=1e-5, rtol=1e-5)
        for name, grad in grads.items():
            assert (grad - results[0][1][name]).norm() <= 1e-4 * results[0][1][name].norm() + 1e-6, name


def test_gradient_checkpointing_changes_no_bit_and_counts_once(variant):
    ids, results = token_ids(small().build()), []
    for on in (False, True):
        model = model_of(variant, gradient_checkpointing=on)
        torch.manual_seed(5)
        output = model(ids[:, :-1], ids[:, 1:])
        output.losses.total.backward()
        router = model.blocks[1].feed_forward.router
        results.append((gradients(model), router.statistics(output.routing[0]), dict(router.named_buffers())))
    (plain, counted, buffers), (saved, again, others) = results
    assert all(torch.equal(plain[name], saved[name]) for name in plain)
    assert counted is None or torch.equal(counted, again)
    assert all(torch.equal(buffers[name], others[name]) for name in buffers)


@pytest.mark.parametrize("pieces", [[1] * 16, [9, 1, 1, 5]])
def test_decoding_with_a_cache_equals_one_full_forward(variant, pieces):
    model = model_of(variant).double().eval()
    ids, parts = token_ids(model), []
    cache = Cache(num_layers=4, rows=2, num_kv_heads=1, head_dim=8, capacity=4, dtype=torch.float64)
    for piece in ids.split(pieces, dim=1):
        parts.append(model(piece, cache=cache).logits_BTV)
        cache.advance([piece.shape[1]] * 2)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits_BTV, atol=1e-9, rtol=0)


@pytest.mark.slow
def test_the_step_compiles_without_a_graph_break(variant):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_of(variant, num_layers=1, moe__every=1, moe__dispatch="grouped_mm").bfloat16()
        ids = token_ids(model)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        compiled(ids[:, :-1], ids[:, 1:]).losses.total.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    torch.compiler.reset()
