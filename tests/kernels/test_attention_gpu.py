"""Every attention backend on CUDA against the naive one in float32, forward and gradient, at the shape of Blues-01
(12 query heads on 1 KV head of 64): `pytest -m gpu tests/kernels/test_attention_gpu.py`.

A backend whose package is not installed is skipped by name; nothing else is.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from blues.kernels.attention import BACKENDS, Situation, attention_naive, capability_of, choose, form_of, supports
from tests.kernels.gpu import CUDA, NEEDS_CUDA, assert_as_good_as_naive, poison
from tests.kernels.test_attention import See, documents_mask, steps

pytestmark = NEEDS_CUDA

HEADS = [(12, 1), (12, 4), (4, 4)]
LENGTHS = [1, 17, 128, 1000]
WINDOWS = [(0, 0), (63, 0), (127, 0), (999, 0), (5000, 0), (20, 30), (-1, 7)]
FUSED = ["sdpa", "sdpa_flash", "sdpa_cudnn", "flex", "flash2", "flash4"]
READ_WINDOWS = ["flex", "flash2", "flash4", "sdpa"]
NAMES = ["out", "q", "k", "v"]


def needs(backend):
    reason = BACKENDS[backend].missing()
    if reason is not None:
        pytest.skip(reason)
    return BACKENDS[backend].attend


def inputs(T, S, heads=(12, 1), B=2, C=64, dtype=torch.bfloat16):
    generator = torch.Generator(CUDA).manual_seed(T)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=CUDA).to(dtype)
    return draw(B, T, heads[0], C), draw(B, S, heads[1], C), draw(B, S, heads[1], C)


def results(function, given, sight, dtype):
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in given)
    out = function(q, k, v, sight)
    ramp = torch.linspace(-1, 1, out.numel(), device=CUDA).view_as(out)
    gradients = torch.autograd.grad((out.float() * ramp).sum(), (q, k, v), allow_unused=True)
    # A single key has weight 1 whatever the query is: no gradient is a gradient of zero.
    zeros = (torch.zeros_like(x) if g is None else g for x, g in zip((q, k, v), gradients, strict=True))
    return [out.detach(), *zeros]


def compare(backend, given, sight, dtype=torch.bfloat16):
    attend = needs(backend)
    exact = results(attention_naive, given, sight, torch.float32)
    naive = results(attention_naive, given, sight, dtype)
    poison()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(fall|kernel not used|does not support|unfused).*")
        fast = results(attend, given, sight, dtype)
    assert_as_good_as_naive(fast, naive, exact, NAMES)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("backend", FUSED)
def test_causal(backend, T, heads):
    compare(backend, inputs(T, T, heads), See(is_causal=True))


@pytest.mark.parametrize("backend", FUSED)
def test_causal_in_float16(backend):
    compare(backend, inputs(128, 128, dtype=torch.float16), See(is_causal=True), torch.float16)


@pytest.mark.parametrize("backend", ["sdpa", "sdpa_math", "flex"])
def test_causal_in_float32(backend):
    given = inputs(128, 128, dtype=torch.float32)
    exact = results(attention_naive, given, See(is_causal=True), torch.float64)
    fast = results(BACKENDS[backend].attend, given, See(is_causal=True), torch.float32)
    assert_as_good_as_naive(fast, fast, exact, NAMES)


def fewer_for_flex(backend, T, kind):
    """FlexAttention is compiled for each length, mask and number of heads, which takes seconds."""
    return backend != "flex" or T in (17, 1000) or kind in ((12, 1), (63, 0))


@pytest.mark.parametrize(
    ("backend", "T", "window"),
    [(b, T, w) for b in READ_WINDOWS for T in LENGTHS for w in WINDOWS if fewer_for_flex(b, T, w)],
)
def test_windows(backend, T, window):
    compare(backend, inputs(T, T), See(window=window))


@pytest.mark.parametrize("window", [None, (63, 0)])
@pytest.mark.parametrize("T", [1, 8, 17])
@pytest.mark.parametrize("backend", FUSED)
def test_decoding(backend, T, window):
    """Few queries at the end of many keys, without a gradient; 12:1 is padded to 16:1 for FlexAttention, up to 8
    queries."""
    if window is not None and backend not in READ_WINDOWS:
        assert supports(backend, situation(See(window=window))) is not None
        return
    attend, given = needs(backend), inputs(T, 1000)
    sight = See(window=window)
    with torch.no_grad():
        exact, naive = (attention_naive(*(x.to(d) for x in given), sight) for d in (torch.float32, torch.bfloat16))
        poison()
        assert_as_good_as_naive([attend(*given, sight)], [naive], [exact], ["out"])


def test_flex_trains_on_few_queries_of_a_group_that_is_a_power_of_two():
    compare("flex", inputs(17, 17, (16, 1)), See(window=(5, 0)))


def test_flex_decodes_with_the_kernel_that_splits_the_keys():
    """By what torch generates. For 12 heads on one, which are not a power of two, it takes the other one."""
    q, k, v = inputs(1, 1000)

    def unpadded(q, k, v, sight):
        compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
        return compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True)

    splits = []
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        for function in (BACKENDS["flex"].attend, unpadded):
            _, code = run_and_get_code(function, q, k, v, See())
            splits.append(any("SPLIT_KV" in text for text in code))
    assert splits == [True, False]


@pytest.mark.parametrize("T", [17, 128, 1000])
@pytest.mark.parametrize("backend", ["flex", "sdpa", "sdpa_math"])
def test_documents_and_padding(backend, T):
    """Row 0 holds three documents, row 1 begins with padding that sees nothing."""
    first, second = T // 3, T // 2 - T // 3
    mask = torch.cat([documents_mask([first, second, T - first - second], T), torch.ones(1, T, T).tril().bool()])
    mask[1, : T // 5] = mask[1, :, : T // 5] = False
    mask = mask.to(CUDA)
    compare(backend, inputs(T, T), See(mask))
    if backend == "flex":
        block_mask = create_block_mask(lambda b, h, q, k: mask[b, q, k], 2, None, T, T, device=CUDA)
        compare(backend, inputs(T, T), See(mask, block_mask=block_mask))


def test_flex_with_a_mask_for_each_head():
    T = 300
    block_mask = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < 16 * (h + 1)), None, 12, T, T, device=CUDA)
    compare("flex", inputs(T, T), See(block_mask=block_mask))


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("T", [100, 128])
@pytest.mark.parametrize("backend", ["sdpa", "sdpa_math"])
def test_a_bias_with_its_gradient(backend, T, alone):
    """Whether queries, keys and values have a gradient too, or the bias alone (all else is frozen)."""
    q, k, v = (x.requires_grad_(not alone) for x in inputs(T, T, dtype=torch.float32))
    bias = torch.randn(1, 12, T, T, device=CUDA).masked_fill(torch.ones(T, T, device=CUDA).triu(1).bool(), -torch.inf)
    both = []
    for attend in (BACKENDS[backend].attend, attention_naive):
        b = bias.clone().requires_grad_()
        out = attend(q, k, v, See(b))
        both.append([out, *torch.autograd.grad(out.square().sum(), b)])
    for name, a, exact in zip(("out", "bias"), *both, strict=True):
        torch.testing.assert_close(a, exact, atol=2e-3, rtol=2e-3, msg=name)


def situation(sight, **changes):
    known = {"form": form_of(sight), "training": True, "cache": False, **changes}
    return Situation("cuda", capability_of(CUDA), torch.bfloat16, 64, 12, 1, **known)


@pytest.mark.parametrize(
    ("backend", "kernel"),
    [("sdpa_flash", "FlashAttention"), ("sdpa_cudnn", "CudnnAttention"), ("sdpa_math", "Softmax")],
)
def test_the_kernel_that_was_named_is_the_one_that_runs(backend, kernel):
    q, k, v = (x.requires_grad_() for x in inputs(128, 128))
    out = BACKENDS[backend].attend(q, k, v, See(is_causal=True))
    assert kernel in steps(out), steps(out)


def test_sdpa_takes_the_memory_efficient_kernel_for_masks_and_float32_and_never_the_quadratic_one():
    for dtype, sight in ((torch.bfloat16, See(window=(20, 0))), (torch.float32, See(is_causal=True))):
        q, k, v = (x.requires_grad_() for x in inputs(128, 128, dtype=dtype))
        out = BACKENDS["sdpa"].attend(q, k, v, sight)
        assert "EfficientAttention" in steps(out), steps(out)


@pytest.mark.parametrize("backend", FUSED)
def test_long_causal_attention_is_never_quadratic(backend):
    attend = needs(backend)
    q, k = (torch.randn(1, 16_384, heads, 64, device=CUDA, dtype=torch.bfloat16) for heads in (12, 1))
    attend(q[:, :256], k[:, :256], k[:, :256], See(is_causal=True))  # compiling takes memory of its own
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(q, k, k, See(is_causal=True))
    assert torch.cuda.max_memory_allocated() - before < 2**28, "the scores alone would be 6 GiB"


@pytest.mark.parametrize("backend", FUSED)
def test_a_compiled_function_around_it_is_one_graph_and_agrees(backend):
    needs(backend)
    given = inputs(128, 128)
    sight = (
        See(is_causal=True)
        if backend != "flex"
        else See(block_mask=create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, device=CUDA))
    )
    compiled = torch.compile(lambda q, k, v, s: BACKENDS[backend].attend(q, k, v, s) * 1.0, fullgraph=True)
    exact = results(attention_naive, given, sight, torch.float32)
    naive = results(attention_naive, given, sight, torch.bfloat16)
    assert_as_good_as_naive(results(compiled, given, sight, torch.bfloat16), naive, exact, NAMES)


@pytest.mark.parametrize("backend", [name for name in FUSED if name != "flex"])
def test_no_backend_waits_for_the_device(backend):
    attend = needs(backend)
    given = [x.requires_grad_() for x in inputs(128, 128)]
    attend(*given, See(is_causal=True)).sum().backward()  # the first run loads and compiles kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(*given, See(is_causal=True)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_automatic_is_the_first_of_the_measured_order_that_is_here():
    order = [name for name in ("flash4", "sdpa_cudnn", "flash2", "sdpa_flash") if BACKENDS[name].missing() is None]
    assert choose("auto", situation(See(is_causal=True))) == order[0]
    windows = [name for name in ("flash4", "flash2", "flex") if BACKENDS[name].missing() is None]
    assert choose("auto", situation(See(window=(5, 0)))) == windows[0]
    assert choose("auto", situation(See(), training=False, cache=True)) == "sdpa_flash"
