import math

import pytest
import torch

from blues.errors import ConfigError
from blues.kernels.attention import assert_supported, attention_naive, attention_sdpa


def inputs(B=2, T=9, S=9, H=6, G=1, C=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()
    return draw(B, T, H, C), draw(B, S, G, C), draw(B, S, G, C)


def with_gradients(function, inputs_, mask, is_causal):
    fresh = [x.detach().clone().requires_grad_() for x in inputs_]
    out = function(*fresh, mask, is_causal)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out, *(x.grad for x in fresh)]


def test_naive_is_the_definition_one_query_at_a_time():
    q, k, v = inputs(B=1, T=4, S=4, H=4, G=2, C=6)
    out = attention_naive(q, k, v, None, True)
    for t in range(4):
        for h in range(4):
            scores = torch.stack([q[0, t, h] @ k[0, s, h // 2] / math.sqrt(6) for s in range(t + 1)])
            expected = sum(p * v[0, s, h // 2] for s, p in enumerate(scores.softmax(0)))
            torch.testing.assert_close(out[0, t, h], expected)


@pytest.mark.parametrize("G", [1, 2, 6])
@pytest.mark.parametrize("case", ["causal", "all", "mask", "row_masks"])
def test_sdpa_equals_naive_forward_and_gradient(G, case):
    given = inputs(T=7, S=7 if case == "causal" else 12, G=G)
    mask = None
    if case in ("mask", "row_masks"):
        mask = torch.rand(1 if case == "mask" else 2, 7, 12, generator=torch.Generator().manual_seed(1)) < 0.5
        mask[:, :, 3] = True  # every query sees a key
    fast = with_gradients(attention_sdpa, given, mask, case == "causal")
    slow = with_gradients(attention_naive, given, mask, case == "causal")
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_sdpa_equals_naive_in_bfloat16_within_its_rounding():
    given = inputs(dtype=torch.bfloat16, T=32, S=32)
    exact = attention_naive(*(x.double() for x in given), None, True)
    error = (attention_sdpa(*given, None, True).double() - exact).abs().max()
    assert error < 2**-6, "values are of order 1; bfloat16 keeps 8 bits"


def test_flash_attention_refuses_head_dims_it_has_no_kernel_for():
    cuda = torch.device("cuda")
    with pytest.raises(ConfigError, match=r"head_dim.*multiple of 8.*got 36.*backend=naive"):
        assert_supported("sdpa", cuda, torch.bfloat16, 36)
    assert_supported("sdpa", cuda, torch.bfloat16, 64)
    assert_supported("sdpa", cuda, torch.float32, 36)
    assert_supported("naive", cuda, torch.bfloat16, 36)
