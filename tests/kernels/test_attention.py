import dataclasses
import math
import re
import warnings
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from blues.errors import ConfigError
from blues.kernels.attention import BACKENDS, Situation, attention_naive, choose, dense_mask, form_of, supports
from blues.kernels.attention.blocks import block_mask_of_tensor, block_mask_of_window
from blues.kernels.attention.choice import candidates
from blues.kernels.attention.flex import MAIN_KERNEL, attention_flex, block_mask_of, decoding_group, fits_decoding

CPU = torch.device("cpu")
TRAINS_ON_CPU = ("naive", "sdpa", "sdpa_math", "sdpa_flash")
GROUPS = [(4, 4), (4, 1), (12, 1), (12, 4), (6, 2)]
"""Query heads and KV heads: one to one, 4:1, 12:1, 3:1, 3:1 with two KV heads."""


class See(NamedTuple):
    """The least that a `Sight` is."""

    mask_BTS: torch.Tensor | None = None
    is_causal: bool = False
    block_mask: BlockMask | None = None
    window: tuple[int, int] | None = None


def inputs(B=2, T=9, S=9, H=6, G=1, C=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()
    return draw(B, T, H, C), draw(B, S, G, C), draw(B, S, G, C)


def with_gradients(function, inputs_, sight):
    fresh = [x.detach().clone().requires_grad_() for x in inputs_]
    out = function(*fresh, sight)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), *(x.grad for x in fresh)]


def random_mask(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def documents_mask(lengths, T):
    number_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (number_T[:, None] == number_T)[None].logical_and(torch.ones(T, T, dtype=torch.bool).tril())


def padded_mask():
    """Row 0 has three tokens of padding in front, which see nothing and are seen by nobody."""
    mask = torch.ones(2, 7, 7, dtype=torch.bool).tril()
    mask[0, :3] = mask[0, :, :3] = False
    return mask


def block_mask(mask, T, S):
    return create_block_mask(lambda b, h, q, k: mask[b, 0, q, k], mask.shape[0], None, T, S, device="cpu")


SIGHTS = {
    "causal": (7, 7, See(is_causal=True)),
    "full": (7, 12, See()),
    "newest_token": (1, 12, See()),
    "one_token": (1, 1, See(is_causal=True)),
    "mask": (7, 12, See(random_mask(1, 7, 12))),
    "mask_of_rows": (7, 12, See(random_mask(2, 7, 12))),
    "mask_of_heads": (7, 12, See(random_mask(1, 12, 7, 12))),
    "documents": (7, 7, See(documents_mask([3, 1, 3], 7))),
    "padding": (7, 7, See(padded_mask())),
    "window": (7, 7, See(window=(2, 0))),
    "window_of_one": (7, 7, See(window=(0, 0))),
    "window_wider_than_the_text": (7, 7, See(window=(100, 0))),
    "window_both_ways": (7, 7, See(window=(1, 2))),
    "window_without_left_end": (7, 7, See(window=(-1, 1))),
    "window_over_a_cache": (3, 12, See(window=(4, 0))),
    "newest_token_in_a_window": (1, 12, See(window=(4, 0))),
    "block_mask": (7, 12, See(block_mask=block_mask(random_mask(2, 1, 7, 12), 7, 12))),
}


def steps(out):
    """Names of all steps of a result's backward; a fused kernel is one of them."""
    seen, waiting = set(), [out.grad_fn]
    while waiting:
        step = waiting.pop()
        if step is not None and step not in seen:
            seen.add(step)
            waiting += [before for before, _ in step.next_functions]
    return " ".join(sorted(step.name() for step in seen))


def case(name, heads):
    T, S, sight = SIGHTS[name]
    H, G = heads
    if name == "mask_of_heads":
        sight = See(sight.mask_BTS[:, :H])
    return inputs(T=T, S=S, H=H, G=G), sight


@pytest.mark.parametrize("shape", [(2, 1, 7, 12), (1, 4, 7, 12), (2, 7, 12)])
@pytest.mark.parametrize("backend", ["sdpa_math", "naive"])
def test_a_bias_is_added_to_the_scores_and_has_a_gradient(backend, shape):
    bias = torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    bias = bias.masked_fill(~random_mask(*shape), -torch.inf)
    bias[..., 2, :] = -torch.inf  # a query that sees nothing
    q, k, v = inputs(T=7, S=12, H=4, G=1)
    bias.requires_grad_()
    scores = torch.einsum("bthc,bsc->bhts", q, k[:, :, 0]) / math.sqrt(8)
    weights = (scores + bias.view(len(bias), -1, 7, 12)).softmax(-1)
    expected = torch.einsum("bhts,bsc->bthc", weights.nan_to_num(0), v[:, :, 0])
    out = BACKENDS[backend].attend(q, k, v, See(bias))
    torch.testing.assert_close(out, expected)
    assert not out[:, 2].any()
    rest = [0, 1, 3, 4, 5, 6]
    for x, y in zip(*(torch.autograd.grad(o[:, rest].square().sum(), (v, bias)) for o in (out, expected)), strict=True):
        torch.testing.assert_close(x, y.nan_to_num(0))
    assert form_of(See(bias, window=(3, 0))) == "bias"


def test_naive_is_the_definition_one_query_at_a_time():
    q, k, v = inputs(B=1, T=4, S=4, H=4, G=2, C=6)
    out = attention_naive(q, k, v, See(is_causal=True))
    for t in range(4):
        for h in range(4):
            scores = torch.stack([q[0, t, h] @ k[0, s, h // 2] / math.sqrt(6) for s in range(t + 1)])
            expected = sum(p * v[0, s, h // 2] for s, p in enumerate(scores.softmax(0)))
            torch.testing.assert_close(out[0, t, h], expected)


@pytest.mark.parametrize("name", SIGHTS)
@pytest.mark.parametrize("backend", [name for name in TRAINS_ON_CPU if name != "naive"])
def test_backends_equal_naive_forward_and_gradient(backend, name):
    for heads in GROUPS:
        tensors, sight = case(name, heads)
        fast = with_gradients(BACKENDS[backend].attend, tensors, sight)
        slow = with_gradients(attention_naive, tensors, sight)
        for a, b in zip(fast, slow, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", SIGHTS)
def test_flex_equals_naive(name):
    for heads in ((12, 1), (6, 2)):
        tensors, sight = case(name, heads)
        with torch.no_grad():
            torch.testing.assert_close(
                BACKENDS["flex"].attend(*tensors, sight), attention_naive(*tensors, sight), atol=1e-6, rtol=1e-5
            )


@pytest.mark.parametrize("backend", TRAINS_ON_CPU)
def test_a_query_that_sees_nothing_gets_zeros_and_passes_no_gradient(backend):
    tensors, sight = case("padding", (4, 1))
    out, dq, dk, dv = with_gradients(BACKENDS[backend].attend, tensors, sight)
    assert not out[0, :3].any() and not dq[0, :3].any()
    assert not dk[0, :3].any() and not dv[0, :3].any(), "nobody sees the padding"
    assert all(x.isfinite().all() for x in (out, dq, dk, dv)) and out[0, 3:].any()


@given(st.integers(1, 9), st.integers(0, 9), st.integers(-1, 10), st.integers(-1, 10), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_window_is_its_rule(T, past, left, right, causal):
    sight = See(window=(left, 0 if causal else right))
    right = sight.window[1]
    S = T + past
    mask = dense_mask(sight, T, S, CPU)[0, 0]
    block = block_mask_of(sight, T, S, CPU)
    for t in range(T):
        p = past + t
        row = [(left < 0 or s >= p - left) and (right < 0 or s <= p + right) for s in range(S)]
        assert mask[t].tolist() == row
        if block is not None:
            keys = torch.arange(S)
            assert block.mask_mod(torch.tensor(0), torch.tensor(0), torch.tensor(t), keys).expand(S).tolist() == row


def assert_same_blocks(a, b):
    """Lists of blocks have no meaning behind their number."""
    assert a.shape == b.shape and a.BLOCK_SIZE == b.BLOCK_SIZE
    for kind in ("kv", "full_kv", "q", "full_q"):
        count, others = getattr(a, f"{kind}_num_blocks"), getattr(b, f"{kind}_num_blocks")
        assert count.dtype == others.dtype == torch.int32 and torch.equal(count, others), kind
        listed, expected = getattr(a, f"{kind}_indices"), getattr(b, f"{kind}_indices")
        assert listed.shape == expected.shape
        meant = torch.arange(listed.shape[-1]) < count[..., None]
        assert torch.equal(listed[meant], expected[meant]), kind


ends = st.sampled_from([-1, 0, 1, 63, 127, 128, 129, 200, 600])


@given(st.integers(1, 400), st.integers(0, 300), ends, ends)
@settings(max_examples=40, deadline=None)
def test_blocks_of_a_window_are_those_of_its_pairs(T, past, left, right):
    S = T + past
    made = block_mask_of_window(left, right, T, S, CPU)
    assert_same_blocks(made, create_block_mask(made.mask_mod, None, None, T, S, device="cpu"))


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 2), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_blocks_of_a_mask_are_those_of_its_pairs(T, S, B, H, seed):
    """Of smooth masks, in which some blocks are empty and some whole."""
    corner = torch.randint(-200, 200, (B, H, 1, 1), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(T)[:, None] - torch.arange(S) + corner).abs() > 90
    made = block_mask_of_tensor(mask)
    shape = [n if n > 1 else None for n in (B, H)]
    assert_same_blocks(made, create_block_mask(lambda b, h, q, k: mask[b, h, q, k], *shape, T, S, device="cpu"))


def test_the_block_mask_of_a_long_window_is_small():
    """Linear memory: 2,048 blocks of 128 on each side, where the pairs would be 64 Gi."""
    mask = block_mask_of_window(1023, 0, 2**18, 2**18, CPU)
    assert mask.kv_num_blocks.sum() == 8 + 2 * 2040 and mask.full_kv_num_blocks.sum() == sum(
        min(n, 7) for n in range(2048)
    )


def test_the_shortest_form_of_a_sight():
    mask, block = random_mask(1, 2, 2), SIGHTS["block_mask"][2].block_mask
    assert form_of(See()) == "full" and form_of(See(is_causal=True)) == "causal"
    assert form_of(See(mask)) == "mask" and form_of(See(mask, block_mask=block)) == "block_mask"
    assert form_of(See(mask, False, block, (3, 0))) == "window"


@pytest.mark.parametrize(("group", "padded"), [(1, 1), (2, 2), (3, 4), (4, 4), (12, 16), (16, 16), (17, 32)])
def test_groups_are_padded_for_flex_decoding(group, padded):
    assert decoding_group(group) == padded


def test_the_decoding_kernel_of_flex_is_asked_for_what_it_takes():
    """Its tile holds all rows of a KV head, and lies within a block of the mask."""
    window = block_mask_of_window(63, 0, 17, 1000, CPU)
    by_head = create_block_mask(lambda b, h, q, k: q + h >= k, None, 4, 2, 9, device="cpu")
    small = create_block_mask(lambda b, h, q, k: q >= k, None, None, 8, 8, device="cpu", BLOCK_SIZE=64)
    assert fits_decoding(1, 16, None) and fits_decoding(8, 16, window) and fits_decoding(127, 1, window)
    assert not fits_decoding(9, 16, None) and not fits_decoding(17, 16, window)
    assert fits_decoding(2, 1, by_head) and not fits_decoding(2, 4, by_head)
    assert fits_decoding(4, 16, small) and not fits_decoding(8, 16, small)


@pytest.mark.parametrize("heads", [(12, 1), (16, 1), (4, 4)])
@pytest.mark.parametrize(("T", "window"), [(1, None), (17, (4, 0)), (17, None), (100, (4, 0)), (130, None)])
def test_flex_names_the_main_kernel_where_the_decoding_kernel_does_not_fit(heads, T, window, monkeypatch):
    seen, real = [], torch.nn.attention.flex_attention.flex_attention

    def spy(q, k, v, **kwargs):
        seen.append((q.shape[1] // k.shape[1], kwargs["kernel_options"]))
        return real(q, k, v, **kwargs)

    monkeypatch.setattr("blues.kernels.attention.flex.flex_attention", spy)
    tensors = inputs(T=T, S=200, H=heads[0], G=heads[1])
    with torch.no_grad():
        out = attention_flex(*tensors, See(window=window))
    torch.testing.assert_close(out, attention_naive(*tensors, See(window=window)), atol=1e-6, rtol=1e-5)
    [(group, options)] = seen
    fits = T * decoding_group(heads[0] // heads[1]) <= 128
    assert group == (decoding_group(heads[0] // heads[1]) if fits else heads[0] // heads[1])
    assert options == (None if fits or T >= 128 else MAIN_KERNEL)


@pytest.mark.parametrize("heads", [(12, 1), (12, 4), (24, 2)])
def test_flex_hands_over_groups_of_a_power_of_two_when_it_decodes(heads, monkeypatch):
    """Padding is cut off again, and each query head still reads its own KV head."""
    seen, real = [], torch.nn.attention.flex_attention.flex_attention

    def spy(q, k, v, **kwargs):
        seen.append(q.shape[1] // k.shape[1])
        return real(q, k, v, **kwargs)

    monkeypatch.setattr("blues.kernels.attention.flex.flex_attention", spy)
    tensors = inputs(T=1, S=12, H=heads[0], G=heads[1])
    for sight in (See(), See(window=(4, 0)), See(random_mask(2, 1, 12))):
        with torch.no_grad():
            out = BACKENDS["flex"].attend(*tensors, sight)
        torch.testing.assert_close(out, attention_naive(*tensors, sight), atol=1e-6, rtol=1e-5)
    assert all(group & (group - 1) == 0 for group in seen) and len(seen) == 3


def test_sdpa_equals_naive_in_bfloat16_within_its_rounding():
    tensors = inputs(dtype=torch.bfloat16, T=32, S=32)
    exact = attention_naive(*(x.double() for x in tensors), See(is_causal=True))
    error = (BACKENDS["sdpa"].attend(*tensors, See(is_causal=True)).double() - exact).abs().max()
    assert error < 2**-6, "values are of order 1; bfloat16 keeps 8 bits"


@pytest.mark.parametrize(("backend", "kernel"), [("sdpa", "Flash"), ("sdpa_flash", "Flash"), ("sdpa_math", "Softmax")])
@pytest.mark.parametrize("name", ["causal", "mask_of_rows", "window"])
def test_the_kernel_that_was_named_is_the_one_that_runs(backend, kernel, name):
    tensors, sight = case(name, (12, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where a kernel refuses
        out = BACKENDS[backend].attend(*tensors, sight)
    assert kernel in steps(out), steps(out)


@pytest.mark.parametrize("backend", ["sdpa_cudnn"])
def test_a_kernel_that_cannot_run_raises_instead_of_handing_over(backend):
    tensors, sight = case("causal", (12, 1))
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="No viable backend|No available kernel"):
        warnings.simplefilter("ignore")
        BACKENDS[backend].attend(*tensors, sight)


def on(device="cuda", capability=(9, 0), dtype=torch.bfloat16, head_dim=64, **rest):
    return Situation(device, capability if device == "cuda" else None, dtype, head_dim, 12, 1, **rest)


@pytest.mark.parametrize(
    ("backend", "situation", "reason"),
    [
        ("sdpa", on(head_dim=36), r"flash attention needs a head_dim that is a multiple of 8 up to 256, got 36"),
        ("sdpa", on(dtype=torch.float64), "do not take float64"),
        ("sdpa", on(dtype=torch.float32, head_dim=6), "multiple of 4, got 6"),
        ("sdpa_flash", on(form="window"), "reads no window"),
        ("sdpa_flash", on(dtype=torch.float32), "takes bfloat16 and float16, not float32"),
        ("sdpa_flash", on(capability=(7, 5)), r"needs compute capability 8.0, this device has 7.5"),
        ("sdpa_cudnn", on(device="cpu"), "runs on CUDA, not on cpu"),
        ("sdpa_cudnn", on(head_dim=256), "up to 128, got 256"),
        ("sdpa_cudnn", on(form="mask"), "reads no mask"),
        ("flex", on(device="cpu"), "no gradient on CPU"),
        ("flex", on(form="bias"), "reads no bias"),
        ("sdpa", on(device="cpu", form="bias"), "no gradient for a bias"),
        ("flex", on(dtype=torch.float64), "does not take float64"),
        ("flex", on(head_dim=8), "head_dim of 16 to 256"),
        ("flash2", on(form="block_mask"), "reads no block mask"),
        ("flash2", on(device="cpu"), "runs on CUDA"),
        ("flash4", on(form="mask"), "reads no mask"),
        ("flash4", on(capability=(8, 0)), "Hopper and Blackwell"),
        ("flash4", on(capability=(10, 0), head_dim=256), "up to 128"),
    ],
)
def test_what_a_backend_cannot_do_is_said(backend, situation, reason):
    assert re.search(reason, supports(backend, situation) or "nothing")


@pytest.mark.parametrize(
    ("backend", "situation"),
    [
        ("naive", on(form="mask", head_dim=6)),
        ("sdpa", on(dtype=torch.float32, head_dim=36)),
        ("sdpa", on(form="mask")),
        ("sdpa_math", on(dtype=torch.float64, form="mask")),
        ("sdpa_flash", on(device="cpu", dtype=torch.float64, form="mask", head_dim=6)),
        ("sdpa_cudnn", on()),
        ("flex", on(form="block_mask")),
        ("flex", on(device="cpu", training=False)),
    ],
)
def test_what_a_backend_can_do_is_not_refused(backend, situation):
    assert supports(backend, situation) is None


@pytest.mark.parametrize("form", ["full", "causal", "window", "block_mask", "mask", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_automatic_trains_every_form_on_every_device(form, dtype):
    for situation in (on("cpu", dtype=dtype, form=form), on(dtype=dtype, form=form), on(capability=(7, 5), form=form)):
        for head_dim in (64, 36, 6, 512):
            choose("auto", dataclasses.replace(situation, head_dim=head_dim))
    assert choose("auto", on("cpu", dtype=dtype, form=form)) == ("sdpa_math" if form == "bias" else "sdpa")


@pytest.mark.parametrize(
    ("situation", "first"),
    [
        (on(), ("flash4", "sdpa_cudnn", "flash2", "sdpa_flash", "sdpa")),
        (on(training=False), ("flash4", "flash2", "sdpa_flash", "sdpa")),
        (on(form="full", training=False, cache=True), ("sdpa_flash", "flash2", "flash4")),
        (on(form="window"), ("flash4", "flash2", "flex", "sdpa")),
        (on(form="window", training=False, cache=True), ("sdpa_flash", "flash2", "flash4", "sdpa")),
        (on(form="block_mask"), ("flex", "sdpa")),
        (on(form="mask"), ("sdpa", "flex", "sdpa_math")),
        (on("cpu"), ("sdpa", "sdpa_math")),
    ],
)
def test_automatic_goes_by_the_measured_order(situation, first):
    assert candidates(situation)[: len(first)] == first


def test_decoding_is_served_without_packages_and_a_window_by_what_reads_one(monkeypatch):
    for name in ("flash2", "flash4"):
        monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS[name], missing=lambda: None))
    decoding = on(form="full", training=False, cache=True)
    assert choose.__wrapped__("auto", decoding) == "sdpa_flash"
    assert choose.__wrapped__("auto", dataclasses.replace(decoding, form="window")) == "flash2"


def test_automatic_leaves_out_what_is_not_installed(monkeypatch):
    for name in ("flash2", "flash4"):
        monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS[name], missing=lambda: "not installed"))
    assert choose.__wrapped__("auto", on()) == "sdpa_cudnn"
    with pytest.raises(ConfigError, match=r"attention.backend: flash4 cannot run here: not installed; change it or"):
        choose.__wrapped__("flash4", on())


def test_the_choice_is_logged_once_for_each_situation(caplog):
    situation = on("cpu", head_dim=24)
    with caplog.at_level("INFO", logger="blues"):
        for _ in range(3):
            choose("auto", situation)
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("attention: sdpa (auto) for Situation(")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ConfigError, match="no 'flash3'; choose from auto, naive, sdpa"):
        supports("flash3", on())
