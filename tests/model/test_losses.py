import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blues.model.losses import combine_losses, load_balancing_loss, router_z_loss
from blues.model.moe.routing import Routing, choose


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
    assert [loss.item() for loss in losses] == [3.0, 3.0, 0.0, 0.0]
