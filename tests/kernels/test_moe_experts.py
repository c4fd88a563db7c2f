import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blues.errors import ConfigError
from blues.kernels.moe_experts import (
    EXPERTS,
    count_per_expert,
    experts_grouped_mm,
    experts_grouped_mm_trimmed,
    experts_naive,
    experts_sorted,
    resolve,
    sort_by_expert,
)

FAST = [  # grouped_mm has no float64
    (experts_sorted, torch.float64),
    (experts_grouped_mm, torch.float32),
    (experts_grouped_mm_trimmed, torch.float32),
]
TOLERANCE = {
    torch.float64: {"atol": 1e-12, "rtol": 1e-10},
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
}


def inputs(T=20, K=2, D=8, E=4, F_=16, dtype=torch.float64, seed=0, unused=()):
    """Random tokens, distinct experts per token (none of `unused`), positive weights, random matrices."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)
    scores = torch.rand(T, E, generator=generator)
    scores[:, list(unused)] = -1
    weights = draw(T, K).softmax(-1)
    return draw(T, D), scores.topk(K).indices, weights, draw(E, 2 * F_, D) / 3, draw(E, D, F_) / 4


def with_gradients(function, x, ids, weights, gate_up, down):
    x, weights, gate_up, down = (t.detach().clone().requires_grad_() for t in (x, weights, gate_up, down))
    y = function(x, ids, weights, gate_up, down)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y, x.grad, weights.grad, gate_up.grad, down.grad]


def one_token_at_a_time(x, ids, weights, gate_up, down):
    rows = []
    for t in range(len(x)):
        row = torch.zeros_like(x[t])
        for k, expert in enumerate(ids[t].tolist()):
            gate, up = (gate_up[expert] @ x[t]).chunk(2)
            row = row + weights[t, k] * (down[expert] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("function", EXPERTS.values(), ids=EXPERTS)
def test_every_token_gets_the_contribution_of_each_of_its_experts(function):
    given_ = inputs(dtype=torch.float32, T=30, K=3)
    torch.testing.assert_close(function(*given_), one_token_at_a_time(*given_), **TOLERANCE[torch.float32])


@pytest.mark.parametrize(("function", "dtype"), FAST)
@settings(max_examples=20, deadline=None)
@given(T=st.integers(1, 40), E=st.integers(1, 6), seed=st.integers(0, 99), data=st.data())
def test_fast_equals_naive_forward_and_gradient(function, dtype, T, E, seed, data):
    K = data.draw(st.integers(1, E))
    given_ = inputs(T=T, E=E, K=K, seed=seed, dtype=dtype)
    for fast, slow in zip(with_gradients(function, *given_), with_gradients(experts_naive, *given_), strict=True):
        torch.testing.assert_close(fast, slow, **TOLERANCE[dtype])


@pytest.mark.parametrize("function", EXPERTS.values(), ids=EXPERTS)
@pytest.mark.parametrize("unused", [(0,), (3,), (1, 2)])
def test_an_expert_without_a_token_has_a_gradient_of_zeros(function, unused):
    given_ = inputs(dtype=torch.float32, unused=unused)
    *_, gate_up_grad, down_grad = with_gradients(function, *given_)
    for expert in range(4):
        used = expert not in unused
        assert bool(gate_up_grad[expert].any()) == used and bool(down_grad[expert].any()) == used


@pytest.mark.parametrize(("function", "dtype"), FAST)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99))
def test_permuting_tokens_permutes_outputs(function, dtype, seed):
    x, ids, weights, gate_up, down = inputs(dtype=dtype, seed=seed)
    permutation = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    straight = function(x, ids, weights, gate_up, down)
    permuted = function(x[permutation], ids[permutation], weights[permutation], gate_up, down)
    torch.testing.assert_close(permuted, straight[permutation], **TOLERANCE[dtype])


@pytest.mark.parametrize(("function", "dtype"), FAST)
def test_nothing_is_dropped_when_all_tokens_want_the_same_experts(function, dtype):
    x, _, weights, gate_up, down = inputs(dtype=dtype, T=50)
    ids = torch.tensor([[2, 1]]).expand(50, 2)
    torch.testing.assert_close(
        function(x, ids, weights, gate_up, down), experts_naive(x, ids, weights, gate_up, down), **TOLERANCE[dtype]
    )


@pytest.mark.parametrize(("function", "dtype"), FAST)
@settings(max_examples=20, deadline=None)
@given(T=st.integers(1, 30), K=st.integers(1, 4), seed=st.integers(0, 99), share=st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_slots_without_an_expert_add_nothing_forward_and_gradient(function, dtype, T, K, seed, share):
    """Also where no slot, or every slot, is without one; weights of such slots need not be 0."""
    x, ids, weights, gate_up, down = inputs(T=T, K=K, dtype=dtype, seed=seed)
    unused = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < share
    ids = ids.masked_fill(unused, 4)
    fast = with_gradients(function, x, ids, weights, gate_up, down)
    for a, b in zip(fast, with_gradients(experts_naive, x, ids, weights, gate_up, down), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[dtype])
    assert not fast[2][unused].any() and not fast[0][unused.all(dim=1)].any()
    kept = one_token_at_a_time(x, ids.clamp(max=3), weights * ~unused, gate_up, down)
    torch.testing.assert_close(fast[0], kept, **TOLERANCE[dtype])


@pytest.mark.parametrize("function", [experts_grouped_mm, experts_grouped_mm_trimmed])
def test_what_grouped_mm_leaves_behind_the_last_group_reaches_nothing(monkeypatch, function):
    """Rows that it does not compute hold whatever lay in memory: here, not-a-numbers, in both directions."""
    original = F.grouped_mm

    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rows, offsets, backward):
            ctx.save_for_backward(offsets)
            ctx.poison_gradient = backward
            return rows.clone() if backward else poison(rows, offsets)

        @staticmethod
        def backward(ctx, grad):
            return (poison(grad, *ctx.saved_tensors) if ctx.poison_gradient else grad), None, None

    def poison(rows, offsets):
        behind = torch.arange(len(rows)) >= offsets[-1]
        return rows.masked_fill(behind[:, None], torch.nan)

    def grouped_mm(rows, matrices, *, offs):
        return Poisoned.apply(original(Poisoned.apply(rows, offs, True), matrices, offs=offs), offs, False)

    monkeypatch.setattr(F, "grouped_mm", grouped_mm)
    x, ids, weights, gate_up, down = inputs(dtype=torch.float32, T=24, K=3)
    ids = ids.masked_fill(torch.rand(ids.shape) < 0.5, 4)
    fast = with_gradients(function, x, ids, weights, gate_up, down)
    for a, b in zip(fast, with_gradients(experts_naive, x, ids, weights, gate_up, down), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("function", EXPERTS.values(), ids=EXPERTS)
def test_bfloat16_keeps_its_dtype_and_its_accuracy(function):
    given_ = inputs(T=64, D=32, F_=64)
    x, ids, weights, gate_up, down = given_
    rounded = [x.bfloat16(), ids, weights.float(), gate_up.bfloat16(), down.bfloat16()]
    exact = one_token_at_a_time(*(t.double() if t.is_floating_point() else t for t in rounded))
    y = function(*rounded)
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize("function", EXPERTS.values(), ids=EXPERTS)
def test_under_autocast_products_are_bfloat16_and_gradients_float32(function):
    x, ids, weights, gate_up, down = inputs(dtype=torch.float32)
    gate_up.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = function(x, ids, weights, gate_up, down)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and gate_up.grad.dtype == torch.float32


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60))
def test_sorting_is_a_stable_permutation_with_its_inverse(ids):
    order = sort_by_expert(torch.tensor(ids)[:, None], 5)
    assert order.pairs_N.tolist() == sorted(range(len(ids)), key=lambda i: ids[i])
    assert order.pairs_N[order.places_N].tolist() == list(range(len(ids)))
    assert order.counts_E.tolist() == [ids.count(expert) for expert in range(5)]
    assert order.unused_N.tolist() == [expert == 5 for expert in ids]
    assert count_per_expert(torch.tensor(ids)[:, None], 5).sum() == len(ids) - ids.count(5)


def test_auto_on_the_cpu_is_sorted_and_impossible_choices_are_refused():
    cpu = torch.device("cpu")
    assert resolve("auto", cpu, torch.float32) == resolve("auto", cpu, torch.float32, empty_slots=True) == "sorted"
    assert resolve("grouped_mm", cpu, torch.float32) == "grouped_mm"
    with pytest.raises(ConfigError, match=r"grouped_mm has no float64.*dispatch=sorted"):
        resolve("grouped_mm", cpu, torch.float64)
