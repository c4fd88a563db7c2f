import pytest
import torch

from blues.errors import ConfigError
from blues.model.attention.layer import Attention, make_view
from blues.model.attention.patterns import Causal
from blues.model.rope import PlainRotary

CPU = torch.device("cpu")
ROPE, CAUSAL = PlainRotary.Config().build(head_dim=8), Causal.Config().build()


def make(seed=0, **changes):
    config = Attention.Config(num_heads=4, num_kv_heads=2, head_dim=8, **changes)
    runtime = {"dim": 24, "norm_eps": 1e-6, "std": 0.3, "output_std": 0.3}
    return config.build(generator=torch.Generator().manual_seed(seed), **runtime).double()


def view(length, **kwargs):
    return make_view(ROPE, CAUSAL, length=length, device=CPU, **kwargs)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_backends_agree_forward_and_gradient(qk_norm):
    results = []
    for backend in ("sdpa", "naive"):
        layer = make(backend=backend, qk_norm=qk_norm)
        x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        layer(x, view(7)).square().sum().backward()
        results.append([x.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


def test_the_fast_cases_of_a_view_equal_the_explicit_mask():
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    layer = make()
    assert view(7).is_causal and view(7).mask_BTS is None
    explicit = view(7, positions_BT=torch.arange(7).expand(2, 7))
    assert explicit.mask_BTS is not None
    torch.testing.assert_close(layer(x, view(7)), layer(x, explicit), atol=1e-12, rtol=0)
    one = view(1, past=4)
    assert one.mask_BTS is None and not one.is_causal and one.key_rotation.cos_BTP.shape[1] == 5
    assert view(2, past=4).mask_BTS.shape == (1, 2, 6)


def test_shared_kv_heads_have_fewer_parameters():
    config = Attention.Config(num_heads=12, num_kv_heads=1, head_dim=64)
    layer = config.build(dim=768, norm_eps=1e-6, std=0.02, output_std=0.02, generator=torch.Generator())
    assert layer.qkv.weight.shape == ((12 + 2) * 64, 768)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("num_kv_heads", {"num_heads": 6, "num_kv_heads": 4}),
        ("head_dim", {"head_dim": 7}),
        ("num_heads", {"num_heads": 0}),
    ],
)
def test_bad_settings_are_refused_by_name(field, values):
    with pytest.raises(ConfigError, match=f"^{field}"):
        Attention.Config(**values)


def packed(lengths, rows=1):
    """Numbers of documents of these lengths side by side: `documents_BT`."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(rows, -1)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_backends_agree_within_documents_forward_and_gradient(qk_norm):
    documents = torch.stack([packed([3, 1, 5])[0], packed([9])[0]])
    results = []
    for backend in ("sdpa", "naive"):
        layer = make(backend=backend, qk_norm=qk_norm)
        x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        layer(x, view(9, documents_BT=documents)).square().sum().backward()
        results.append([x.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


def test_a_token_sees_its_own_document_up_to_itself():
    documents = torch.tensor([[4, 4, 7, 7, 7, 4]])
    mask = view(6, documents_BT=documents).mask_BTS
    expected = [[s <= t and documents[0, s] == documents[0, t] for s in range(6)] for t in range(6)]
    assert mask.tolist() == [expected]


def test_one_document_is_no_restriction():
    x, layer = torch.randn(2, 7, 24, dtype=torch.float64), make()
    whole = layer(x, view(7, documents_BT=packed([7], rows=2)))
    torch.testing.assert_close(whole, layer(x, view(7)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("past", [0, 4])
def test_documents_and_a_cache_are_refused(past):
    with pytest.raises(ValueError, match="documents cannot be told apart in a KV cache; give each its own row"):
        view(7, past=past, documents_BT=packed([3, 4]))
