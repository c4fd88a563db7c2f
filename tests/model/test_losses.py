import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blues.model.losses import (
    UpdateLoad,
    combine_losses,
    load_balancing_loss,
    router_z_loss,
    sequence_balancing_loss,
)
from blues.model.moe.routing import Routing, choose
from tests.model.examples import gradients, lively, small, tokens


def balanced(num_experts, top_k):
    """Uniform probabilities, every expert chosen equally often."""
    ids = (torch.arange(num_experts)[:, None] + torch.arange(top_k)) % num_experts
    logits = torch.zeros(num_experts, num_experts)
    return Routing(torch.full((num_experts, top_k), 1 / top_k), ids, logits.softmax(-1), logits)


def collapsed(num_experts, top_k, tokens=10):
    logits = torch.full((tokens, num_experts), -50.0)
    logits[:, :top_k] = 0.0
    return choose(logits, logits, top_k)


@given(st.integers(1, 9), st.data())
def test_balance_is_one_when_balanced_and_experts_over_k_when_collapsed(num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    assert load_balancing_loss(balanced(num_experts, top_k)).item() == pytest.approx(1)
    assert load_balancing_loss(collapsed(num_experts, top_k)).item() == pytest.approx(num_experts / top_k)


def test_balance_agrees_with_transformers():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    logits = torch.randn(50, 6)
    theirs = load_balancing_loss_func((logits,), num_experts=6, top_k=2)
    torch.testing.assert_close(load_balancing_loss(choose(logits, logits, 2)), theirs / 2)


def test_balance_uses_clean_probabilities_and_actual_choices():
    clean, noisy = torch.randn(50, 4), torch.randn(50, 4)
    routing = choose(clean, noisy, 2)
    share = torch.bincount(noisy.topk(2).indices.flatten(), minlength=4) / 100
    torch.testing.assert_close(load_balancing_loss(routing), 4 * (share * clean.softmax(-1).mean(0)).sum())


def test_descending_the_balance_loss_evens_the_load():
    logits = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 0, 0, -2])
    bias = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([bias], lr=0.5)
    start = load_balancing_loss(choose(logits, logits, 1)).item()
    for _ in range(100):
        optimizer.zero_grad()
        biased = logits + bias
        load_balancing_loss(choose(biased, biased, 1)).backward()
        optimizer.step()
    assert start > 1.5 and load_balancing_loss(choose(logits + bias, logits + bias, 1)).item() < 1.05


def test_z_loss_is_the_mean_squared_logsumexp():
    routing = balanced(4, 2)
    assert router_z_loss(routing).item() == pytest.approx(torch.tensor(4.0).log().square().item())


def test_total_is_the_weighted_sum_over_mean_layers():
    first, second = balanced(4, 1), collapsed(4, 1)
    losses = combine_losses(torch.tensor(3.0), [first, second], load_balancing_weight=0.5, router_z_weight=0.25)
    z = (router_z_loss(first) + router_z_loss(second)) / 2
    assert losses.load_balancing.item() == pytest.approx((1 + 4) / 2)
    torch.testing.assert_close(losses.total, 3.0 + 0.5 * 2.5 + 0.25 * z)


def test_without_mixtures_the_total_is_the_cross_entropy():
    losses = combine_losses(torch.tensor(3.0), [], load_balancing_weight=0.5, router_z_weight=0.25)
    assert [loss.item() for loss in losses] == [3.0, 3.0, 0.0, 0.0, 0.0, 0.0]


def rows_of(routing, rows):
    """The routing of each row by itself."""
    parts = [tensor.unflatten(0, (rows, -1)).unbind() for tensor in routing[:4]]
    return [Routing(*part) for part in zip(*parts, strict=True)]


def test_balance_by_sequence_is_the_mean_of_each_row_s():
    logits = torch.randn(5 * 12, 6)
    routing = choose(logits, logits, 2)
    expected = torch.stack([load_balancing_loss(row) for row in rows_of(routing, 5)]).mean()
    torch.testing.assert_close(sequence_balancing_loss(routing, 5), expected)
    assert expected > load_balancing_loss(routing)
    combined = combine_losses(
        torch.tensor(3.0), [routing], load_balancing_weight=1.0, router_z_weight=0.0, scope="sequence", rows=5
    )
    torch.testing.assert_close(combined.total, 3.0 + expected)


def test_empty_slots_are_nobody_s_load():
    logits = torch.randn(50, 6)
    routing = choose(logits, logits, 2)
    dropped = routing._replace(ids_TK=routing.ids_TK.masked_fill(torch.rand(50, 2) < 0.5, 6))
    count = torch.bincount(dropped.ids_TK.flatten(), minlength=7)[:6]
    expected = 6 * (count / count.sum() * routing.probs_TE.mean(0)).sum()
    torch.testing.assert_close(load_balancing_loss(dropped), expected)
    torch.testing.assert_close(sequence_balancing_loss(dropped, 1), expected)
    nothing = routing._replace(ids_TK=torch.full((50, 2), 6))
    assert load_balancing_loss(nothing) == sequence_balancing_loss(nothing, 5) == 0


def test_the_load_of_an_update_adds_up_until_the_next():
    load = UpdateLoad()
    first, second = torch.tensor([1, 2, 3]), torch.tensor([4, 5])
    assert [counts.tolist() for counts in load.add([first, second])] == [[1, 2, 3], [4, 5]]
    assert [counts.tolist() for counts in load.add([first, second])] == [[2, 4, 6], [8, 10]]
    load.reset()
    assert load.add([second])[0].tolist() == [4, 5]


def test_penalties_of_routers_are_averaged_over_layers_into_the_total():
    routings = [balanced(4, 1)._replace(penalty=torch.tensor(penalty)) for penalty in (0.5, 0.25)]
    losses = combine_losses(torch.tensor(3.0), routings, load_balancing_weight=0.0, router_z_weight=0.0)
    assert losses.total.item() == pytest.approx(3.375) and losses.cross_entropy.item() == 3.0


def test_a_router_that_balances_itself_has_no_balancing_loss_and_the_figure_is_reported():
    ids = tokens(small().build())
    results = []
    for weight in (0.0, 5.0):
        model = lively(small(moe__router="sigmoid_bias", moe__load_balancing_weight=weight).build())
        losses = model(ids, ids).losses
        losses.total.backward()
        results.append((losses, gradients(model)))
    (without, plain), (with_weight, weighted) = results
    assert torch.equal(without.total, with_weight.total) and with_weight.load_balancing > 1
    assert all(torch.equal(plain[name], weighted[name]) for name in plain)


@pytest.mark.parametrize(("variant", "applies"), [("softmax_top_k", True), ("relu", False), ("sigmoid_bias", False)])
def test_the_z_loss_applies_to_a_softmax_alone(variant, applies):
    ids = tokens(small().build())
    totals = []
    for weight in (0.0, 5.0):
        model = lively(small(moe__router=variant, moe__router_z_weight=weight).build())
        losses = model(ids, ids).losses
        totals.append(losses.total)
        assert losses.router_z > 0
    assert torch.equal(*totals) != applies


HEAVY = {"moe__load_balancing_weight": 3.0, "moe__router_z_weight": 0.5, "moe__router": "softmax_top_k"}
"""Auxiliary losses so heavy that a wrong scale shows in every gradient."""


def update(micro_batches, **changes):
    """Mean loss, and gradients, of one update of these micro batches."""
    model = lively(small(**HEAVY, **changes).build(), std=0.1).double()
    load, total = UpdateLoad(), 0.0
    for ids in micro_batches:
        loss = model(ids[:, :-1], ids[:, 1:], load=load).losses.total / len(micro_batches)
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def assert_same_update(first, second):
    assert first[0] == pytest.approx(second[0], abs=1e-6)
    for name, grad in first[1].items():
        torch.testing.assert_close(grad, second[1][name], atol=1e-6, rtol=1e-6)  # loads are float32


def rows(number=4):
    return tokens(small().build(), batch=number, length=17)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_balancing_by_sequence_is_the_same_in_any_micro_batches(checkpointing):
    changes = {"moe__load_balancing_scope": "sequence", "gradient_checkpointing": checkpointing}
    whole = update([rows()], **changes)
    for size in (1, 2):
        assert_same_update(update(rows().split(size), **changes), whole)


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equal_micro_batches_are_one_large_batch_in_every_scope(scope, checkpointing):
    changes = {"moe__load_balancing_scope": scope, "gradient_checkpointing": checkpointing}
    assert_same_update(update([rows()] * 3, **changes), update([rows().repeat(3, 1)], **changes))


def test_the_z_loss_is_the_same_in_any_micro_batches():
    changes = {"moe__load_balancing_weight": 0.0}
    model_changes = {**HEAVY, **changes}
    results = []
    for micro_batches in ([rows()], rows().split(1)):
        model = lively(small(**model_changes).build(), std=0.1).double()
        for ids in micro_batches:
            (model(ids[:, :-1], ids[:, 1:]).losses.total / len(micro_batches)).backward()
        results.append((0.0, gradients(model)))
    assert_same_update(*results)


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_recomputation_changes_no_bit_of_any_scope(scope):
    results = [
        update(rows().split(2), moe__load_balancing_scope=scope, gradient_checkpointing=on) for on in (False, True)
    ]
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


def test_over_the_global_batch_the_last_micro_batch_knows_all_loads():
    """Its gradient is that of its own probabilities under the load of the whole update."""
    logits = torch.randn(40, 4, dtype=torch.float64, requires_grad=True)
    whole = choose(logits, logits, 2)
    first, last = rows_of(whole, 2)
    load = UpdateLoad()
    weights = {"load_balancing_weight": 1.0, "router_z_weight": 0.0, "scope": "global_batch", "load": load}
    zero = torch.zeros((), dtype=torch.float64)
    combine_losses(zero, [first], **weights)
    total = combine_losses(zero, [last], **weights).total
    share = torch.bincount(whole.ids_TK.flatten(), minlength=4) / 80
    torch.testing.assert_close(total, 4 * (share * last.probs_TE.mean(0)).sum(), atol=1e-6, rtol=1e-6)
