import pytest
import torch

from blues.errors import ConfigError
from blues.model.context import Context
from blues.model.moe.layer import MoE


def make(**changes):
    config = MoE.Config(num_experts=4, top_k=2, ffn_dim=12, **changes)
    return config.build(dim=16, std=0.4, output_std=0.4, generator=torch.Generator().manual_seed(0))


def context(x):
    return Context(torch.zeros(x.shape[:2], dtype=torch.int64))


def test_dispatches_agree_forward_and_gradient():
    results = []
    for dispatch in ("naive", "sorted", "grouped_mm"):
        layer = make(dispatch=dispatch)
        x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(2)  # the same noise
        y, routing = layer(x, context(x))
        assert y.shape == x.shape and routing.ids_TK.shape == (18, 2)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    for fast in results[1:]:
        for a, b in zip(fast, results[0], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_permuting_tokens_permutes_outputs_and_routing():
    layer = make().double().eval()
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    permutation = torch.randperm(12)
    (y, routing), (z, permuted) = layer(x, context(x)), layer(x[:, permutation], context(x))
    torch.testing.assert_close(z, y[:, permutation], atol=1e-12, rtol=0)
    assert torch.equal(permuted.ids_TK, routing.ids_TK[permutation])


def test_every_parameter_has_a_gradient_when_one_token_leaves_experts_idle():
    layer = make()
    x = torch.randn(1, 1, 16)
    y, routing = layer(x, context(x))
    (y.sum() + routing.logits_TE.sum()).backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    idle = [expert for expert in range(4) if expert not in routing.ids_TK[0]]
    assert len(idle) == 2 and not grads["experts.down_EDF"][idle].any()


@pytest.mark.parametrize(
    ("field", "values"),
    [("top_k", {"num_experts": 2, "top_k": 3}), ("every", {"every": 0}), ("router_z_weight", {"router_z_weight": -1})],
)
def test_bad_settings_are_refused_by_name(field, values):
    with pytest.raises(ConfigError, match=f"^{field}"):
        MoE.Config(**values)
