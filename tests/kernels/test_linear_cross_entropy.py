import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blues.kernels import linear_cross_entropy as module
from blues.kernels.linear_cross_entropy import (
    IGNORED,
    linear_cross_entropy_chunked,
    linear_cross_entropy_naive,
)
from blues.training.memory import peak_bytes


def inputs(T=300, D=16, V=50, ignored=0.2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, D, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(V, (T,), generator=generator)
    targets[torch.rand(T, generator=generator) < ignored] = IGNORED
    return x, weight, targets


def with_gradients(function, x, weight, targets, scale=1.0):
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss = function(x, weight, targets)
    (loss * scale).backward()
    return loss.detach(), x.grad, weight.grad


def test_naive_is_the_mean_negative_log_probability():
    x, weight, targets = inputs(T=5)
    logs = (x @ weight.T).log_softmax(-1)
    expected = -sum(logs[t, target] for t, target in enumerate(targets) if target != IGNORED)
    torch.testing.assert_close(linear_cross_entropy_naive(x, weight, targets), expected / (targets != IGNORED).sum())


@settings(max_examples=25, deadline=None)
@given(T=st.integers(1, 400), V=st.integers(2, 80), ignored=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99))
def test_chunked_equals_naive_forward_and_gradient(T, V, ignored, seed):
    x, weight, targets = inputs(T=T, V=V, ignored=ignored, seed=seed)
    slow = with_gradients(linear_cross_entropy_naive, x, weight, targets, scale=3.0)
    fast = with_gradients(linear_cross_entropy_chunked, x, weight, targets, scale=3.0)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_several_chunks_and_a_ragged_last_one_are_really_used(monkeypatch):
    calls = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(module, "CHUNK_BYTES_CPU", 0)
    monkeypatch.setattr(module.F, "linear", lambda x, w: calls.append(len(x)) or linear(x, w))
    linear_cross_entropy_chunked(*inputs(T=300))
    assert calls == [128, 128, 44]


def test_extreme_logits_stay_finite():
    x, weight, targets = inputs(T=8)
    loss, grad_x, grad_weight = with_gradients(linear_cross_entropy_chunked, x * 1e4, weight, targets)
    assert torch.isfinite(loss) and torch.isfinite(grad_x).all() and torch.isfinite(grad_weight).all()


def test_all_targets_ignored_is_a_loss_of_zero_with_gradients_of_zero():
    x, weight, targets = inputs(ignored=1.0)
    for function in (linear_cross_entropy_naive, linear_cross_entropy_chunked):
        loss, grad_x, grad_weight = with_gradients(function, x, weight, targets)
        assert loss == 0 and not grad_x.any() and not grad_weight.any()


def test_gradients_of_a_tied_weight_add_up():
    """The weight is the embedding too: its gradient is the sum of both uses."""
    _, weight, targets = inputs(T=40, V=50)
    ids = torch.arange(40) % 50
    tied = {}
    for function in (linear_cross_entropy_naive, linear_cross_entropy_chunked):
        table = weight.detach().clone().requires_grad_()
        function(table[ids] * 1.5, table, targets).backward()
        tied[function] = table.grad
    torch.testing.assert_close(*tied.values(), atol=1e-12, rtol=1e-10)


def test_without_gradients_nothing_is_kept():
    x, weight, targets = inputs()
    with torch.no_grad():
        loss = linear_cross_entropy_chunked(x, weight, targets)
    assert loss.grad_fn is None
    torch.testing.assert_close(loss, linear_cross_entropy_naive(x, weight, targets).detach())


def test_only_the_weight_needs_a_gradient():
    x, weight, targets = inputs()
    grads = []
    for function in (linear_cross_entropy_naive, linear_cross_entropy_chunked):
        table = weight.detach().clone().requires_grad_()
        function(x.detach(), table, targets).backward()
        grads.append(table.grad)
    torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-10)


def test_bfloat16_sums_in_float32():
    x, weight, targets = inputs(T=512, D=32, V=200, ignored=0.1)
    exact = with_gradients(linear_cross_entropy_naive, x.bfloat16().double(), weight.bfloat16().double(), targets)
    rounded = with_gradients(linear_cross_entropy_chunked, x.bfloat16(), weight.bfloat16(), targets)
    assert rounded[0].dtype == torch.float32 and rounded[2].dtype == torch.bfloat16
    for a, b in zip(rounded, exact, strict=True):
        assert (a.double() - b).norm() / b.norm() < 0.01


@pytest.mark.parametrize("function", [linear_cross_entropy_naive, linear_cross_entropy_chunked])
def test_under_autocast_parameters_keep_float32_gradients(function):
    x, weight, targets = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = function(x, weight, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and weight.grad.dtype == torch.float32 and x.grad.dtype == torch.float32


def test_a_uniform_model_has_the_entropy_of_its_vocabulary():
    x, weight, targets = inputs(V=64)
    assert linear_cross_entropy_chunked(x * 0, weight, targets).item() == pytest.approx(math.log(64))


def test_memory_holds_the_logits_of_one_chunk_whatever_the_length():
    D, V, chunk = 4, 512, 64
    peaks, both = {}, (linear_cross_entropy_naive, linear_cross_entropy_chunked)
    for function in both:
        for T in (512, 1024):
            x, weight, targets = inputs(T=T, D=D, V=V, dtype=torch.float32)
            peaks[function, T] = peak_bytes(lambda f=function, a=(x, weight, targets): f(*a, chunk).backward())
    grown = {function: (peaks[function, 1024] - peaks[function, 512]) / 512 for function in both}
    assert grown[linear_cross_entropy_naive] > 4 * V  # at least the logits of every token
    assert grown[linear_cross_entropy_chunked] <= 4 * 4 * D  # a few vectors of the width of the input
    assert peaks[linear_cross_entropy_chunked, 1024] < 4 * (4 * chunk * V)
