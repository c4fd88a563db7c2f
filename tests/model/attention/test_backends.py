import pytest
import torch

from blues.errors import ConfigError
from blues.kernels.attention import attention_naive
from blues.model.attention.backends import Attend, resolve
from blues.model.attention.layer import View

SHAPE = {"head_dim": 8, "num_heads": 6, "num_kv_heads": 2}
CAUSAL = View(None, None, None, True)


def tensors(T=7, S=7, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: (torch.randn(*shape, generator=generator) * scale).to(dtype)
    return draw(2, T, 6, 8), draw(2, S, 2, 8), draw(2, S, 2, 8)


def where(device="cpu", dtype=torch.float32, **changes):
    return {"device": torch.device(device), "dtype": dtype, **SHAPE, **changes}


def test_the_choice_follows_the_configuration():
    assert resolve("auto", **where()) == resolve("sdpa", **where()) == "sdpa"
    assert resolve("naive", **where()) == "naive"
    with pytest.raises(ConfigError, match=r"attention.backend: flex cannot run here: .*no gradient on CPU"):
        resolve("flex", **where())
    assert resolve("flex", **where(training=False)) == "flex"


@pytest.mark.parametrize("backend", ["auto", "naive", "sdpa", "sdpa_math", "sdpa_flash"])
def test_a_layer_attends_with_what_it_was_told_to(backend):
    q, k, v = tensors()
    out = Attend(backend, **SHAPE)(q, k, v, CAUSAL)
    torch.testing.assert_close(out, attention_naive(q, k, v, CAUSAL))


def test_the_device_and_the_view_decide_at_the_first_forward_that_needs_them():
    attend = Attend("flex", **SHAPE)
    q, k, v = tensors()
    torch.testing.assert_close(attend(q, k, v, CAUSAL), attention_naive(q, k, v, CAUSAL), atol=1e-6, rtol=1e-5)
    with pytest.raises(ConfigError, match="no gradient on CPU"):
        attend(q.requires_grad_(), k, v, CAUSAL)


def test_autocast_decides_the_format_and_does_not_change_it_again():
    q, k, v = tensors()
    attend = Attend("naive", **SHAPE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(q, k, v, CAUSAL)
    expected = attention_naive(q.bfloat16(), k.bfloat16(), v.bfloat16(), CAUSAL).float()
    assert torch.equal(out, expected)
    exact = Attend("naive", "float32", **SHAPE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = exact(q, k, v, CAUSAL)
    torch.testing.assert_close(out, attention_naive(q, k, v, CAUSAL))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["auto", "naive", "sdpa"])
def test_a_compiled_layer_is_one_graph_and_agrees(backend, autocast):
    q, k, v = (x.requires_grad_() for x in tensors())
    attend = Attend(backend, **SHAPE)
    compiled = torch.compile(attend.__call__, fullgraph=True, backend="eager")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out, plain = compiled(q, k, v, CAUSAL), attend(q, k, v, CAUSAL)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(
        out, attention_naive(q, k, v, CAUSAL), **({"atol": 0.02, "rtol": 0.02} if autocast else {})
    )


def test_a_bias_that_trains_alone_is_training():
    """With all else frozen, "auto" must not take a kernel without a gradient for it."""
    q, k, v = tensors()
    both = []
    for backend in ("auto", "naive"):
        bias = torch.zeros(2, 7, 7, requires_grad=True)
        out = Attend(backend, **SHAPE)(q, k, v, View(None, None, bias, False))
        both.append(torch.autograd.grad(out.square().sum(), bias)[0])
    torch.testing.assert_close(*both)
    with pytest.raises(ConfigError, match="no gradient for a bias"):
        Attend("sdpa", **SHAPE)(q, k, v, View(None, None, bias, False))
