"""What we tell the packages flash-attn 2 and 4, and how flash-attn-4 becomes an operator of torch.

The packages are honest fakes here: the naive backend, under their names and with their arguments. The real ones are
tested on a GPU machine, see test_attention_gpu.py.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch

from blues.kernels.attention import BACKENDS, attention_naive, dense_mask
from tests.kernels.test_attention import GROUPS, SIGHTS, See, inputs, with_gradients

READ = [name for name, (_, _, sight) in SIGHTS.items() if sight.mask_BTS is None and sight.block_mask is None]


class FlashAttention2:
    @staticmethod
    def flash_attn_func(q, k, v, causal=False, window_size=(-1, -1)):
        left, right = window_size
        if causal:
            right = 0
        return attention_naive(q, k, v, See(window=(left, right)))


class FlashAttention4:
    """`out` and `lse` first, more after them; None is no limit of a window."""

    calls: list[dict] = []

    @classmethod
    def _sight(cls, causal=False, window_size_left=None, window_size_right=None):
        assert not (causal and (window_size_left is not None or window_size_right is not None))
        left, right = (-1 if x is None else x for x in (window_size_left, window_size_right))
        return See(window=(-1, 0)) if causal else See(window=(left, right))

    @classmethod
    def _flash_attn_fwd(cls, q, k, v, *, return_lse, **window):
        cls.calls.append(window)
        assert return_lse and not any(x.requires_grad for x in (q, k, v))
        return attention_naive(q, k, v, cls._sight(**window)), q.new_zeros(q.shape[0], q.shape[2], q.shape[1]), None

    @classmethod
    def _flash_attn_bwd(cls, q, k, v, out, dout, lse, **window):
        """By hand: an operator's body records no gradient."""
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and dout.is_contiguous()
        (_, T, H, C), (_, S, G, _) = q.shape, k.shape
        k_, v_ = (x.repeat_interleave(H // G, dim=2) for x in (k, v))
        scores = torch.einsum("bthc,bshc->bhts", q, k_) * C**-0.5
        mask = dense_mask(cls._sight(**window), T, S, q.device)
        weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
        dweights = torch.einsum("bthc,bshc->bhts", dout, v_)
        dscores = weights * (dweights - (dout * out).sum(-1).transpose(1, 2)[..., None]) * C**-0.5
        dk, dv = (torch.einsum("bhts,bthc->bshc", a, b) for a, b in ((dscores, q), (weights, dout)))
        dk, dv = (x.unflatten(2, (G, H // G)).sum(3) for x in (dk, dv))
        return torch.einsum("bhts,bshc->bthc", dscores, k_), dk, dv, None


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    flash, cute = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.cute")
    flash.flash_attn_func, flash.cute, cute.interface = FlashAttention2.flash_attn_func, cute, FlashAttention4
    for name, module in (("flash_attn", flash), ("flash_attn.cute", cute)):
        monkeypatch.setitem(sys.modules, name, module)
    FlashAttention4.calls.clear()


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("backend", ["flash2", "flash4"])
def test_arguments_say_what_the_sight_says(backend, name):
    T, S, sight = SIGHTS[name]
    for H, G in GROUPS:
        given = inputs(T=T, S=S, H=H, G=G)
        fast, slow = (with_gradients(f, given, sight) for f in (BACKENDS[backend].attend, attention_naive))
        for a, b in zip(fast, slow, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_causality_takes_the_faster_path_than_a_window():
    given = inputs(T=7, S=7)
    for sight in (See(is_causal=True), See(window=(-1, 0))):
        BACKENDS["flash4"].attend(*given, sight)
    assert FlashAttention4.calls == [{"causal": True}] * 2


@pytest.mark.parametrize("sight", [See(is_causal=True), See(window=(2, 0))])
def test_a_model_is_compiled_whole_around_flash4(sight):
    def function(q, k, v):
        return BACKENDS["flash4"].attend(q * 1.5, k, v, sight).square()

    given = inputs(T=7, S=7)
    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        fresh = [x.detach().clone().requires_grad_() for x in given]
        out = f(*fresh)
        results.append([out, *torch.autograd.grad(out.sum(), fresh)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_operator_keeps_torchs_rules():
    """Schema, fake tensors and the registration of the gradient (`torch.library.opcheck`)."""
    q, k, v = (x.detach().float().requires_grad_() for x in inputs(T=7, S=7))
    torch.library.opcheck(torch.ops.blues.flash4.default, (q, k, v, 2, 0))
