import torch

from blues.model.layers import Linear, RMSNorm, SwiGLU


def test_rms_norm_is_its_definition():
    norm = RMSNorm(6, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(4, 6)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_rms_norm_of_bfloat16_has_float32_statistics():
    norm = RMSNorm(512, eps=1e-6).bfloat16()
    x = (torch.randn(64, 512) * 100).bfloat16()
    exact = RMSNorm(512, eps=1e-6)(x.float())
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), exact.bfloat16()), "one rounding, at the end"


def test_swiglu_is_its_definition():
    layer = SwiGLU(6, 10, std=0.5, output_std=0.5, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 6)
    gate, up = layer.gate_up.weight[:10] @ x.T, layer.gate_up.weight[10:] @ x.T
    torch.testing.assert_close(layer(x), (layer.down.weight @ (gate * gate.sigmoid() * up)).T)


def test_weights_come_from_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    make = lambda seed: Linear(200, 300, std=0.02, generator=torch.Generator().manual_seed(seed)).weight
    assert torch.equal(make(1), make(1)) and not torch.equal(make(1), make(2))
    assert torch.equal(before, torch.get_rng_state())
    assert abs(make(1).std().item() - 0.02) < 2e-4
