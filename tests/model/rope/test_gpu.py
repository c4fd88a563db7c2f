"""Rotary embeddings on a GPU."""

import pytest
import torch

from blues.inference.cache import Cache
from tests.model.examples import gradients, tokens
from tests.model.rope.test_model import model_of
from tests.model.rope.test_variants import VARIANTS, build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_tables_equal_the_computation_bit_for_bit_and_the_cpu_closely(variant):
    rope = build(variant, head_dim=64)
    for length in (100, 700, 2048):
        positions_BT = torch.arange(length, device="cuda")[None]
        elsewhere = rope(positions_BT.cpu(), length)
        pairs = zip(rope(positions_BT, length), rope.compute(positions_BT, length), elsewhere, strict=True)
        for got, expected, on_cpu in pairs:
            assert torch.equal(got, expected)
            # one bit of a frequency's 24 is 1.2e-4 radians at position 2048
            torch.testing.assert_close(got.cpu(), on_cpu, atol=5e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_table_is_looked_up_without_waiting_for_the_device(variant):
    rope = build(variant)
    positions_BT = torch.arange(100, device="cuda")[None]
    rope(positions_BT, 100)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rope(positions_BT, 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_compiled_model_learns_what_the_plain_one_does(variant):
    model = model_of(variant, num_layers=2, moe=None).cuda()
    ids = tokens(model, length=41).cuda()
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, dynamic=False)):
        model.zero_grad()
        losses = forward(ids[:, :-1], ids[:, 1:]).losses
        losses.total.backward()
        results.append((losses.total.detach(), gradients(model)))
    (plain, grads), (compiled, others) = results
    torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=1e-4)
    for name, grad in grads.items():
        assert (others[name] - grad).norm() <= 1e-2 * grad.norm() + 1e-6, name
    torch.compiler.reset()


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_equals_one_forward_over_the_text_so_far(variant):
    model = model_of(variant, num_layers=1, moe=None).double().cuda().eval()
    ids = tokens(model, length=40).cuda()
    cache = Cache(num_layers=1, rows=2, num_kv_heads=1, head_dim=8, capacity=4, dtype=torch.float64, device="cuda")
    for length in range(1, 41):
        step = model(ids[:, length - 1 : length], cache=cache).logits_BTV[:, -1]
        cache.advance([1, 1])
        torch.testing.assert_close(step, model(ids[:, :length]).logits_BTV[:, -1], atol=1e-9, rtol=0)
