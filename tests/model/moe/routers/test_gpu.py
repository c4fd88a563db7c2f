"""Routers on CUDA in bfloat16: what they compute, when the host waits, and what torch.compile makes of them."""

from __future__ import annotations

import pytest
import torch

from blues.model.moe.layer import MoE
from blues.model.moe.routing import Router
from blues.model.transformer import Transformer
from tests.model.moe.routers.examples import VARIANTS

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:moe.router=expert_choice")]
CUDA = torch.device("cuda")


def config_of(variant, **changes):
    moe = MoE.Config(router=Router.variants[variant].Config())
    return Transformer.Config(vocab_size=4096, num_layers=2, moe=moe).override(changes)


def step(model, seed=1):
    ids = torch.randint(4096, (2, 257), generator=torch.Generator().manual_seed(0)).to(CUDA)
    torch.manual_seed(seed)
    model.zero_grad()
    losses = model(ids[:, :-1], ids[:, 1:]).losses
    losses.total.backward()
    return losses.total.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def error(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_step_agrees_with_naive_and_waits_only_where_slots_are_empty(variant):
    config = config_of(variant)
    model = config.build(seed=0).to(CUDA, torch.bfloat16)
    slow = config.override({"moe.dispatch": "naive"}).build(seed=0).to(CUDA, torch.bfloat16)
    empty = Router.variants[variant].empty_slots
    assert model.backends(CUDA, torch.bfloat16)["experts"] == ("grouped_mm_trimmed" if empty else "grouped_mm")
    torch.empty(2**28, device=CUDA).fill_(torch.nan)  # what grouped_mm does not write would be no number
    (total, grads), (expected, exact) = step(model), step(slow)
    assert abs(total - expected) < 1e-3 * expected
    for name, grad in grads.items():
        assert grad.isfinite().all(), name
        if exact[name].norm() > 1e-6:
            assert error(grad, exact[name]) < 0.05, name
    torch.cuda.set_sync_debug_mode("error")
    try:
        if empty:
            with pytest.raises(RuntimeError, match="synchronizing"):
                step_on_device(model)
        else:
            step_on_device(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step_on_device(model):
    """A step without a copy from the host."""
    ids = torch.arange(512, device=CUDA).view(2, 256)
    model(ids, ids).losses.total.backward()


@pytest.mark.parametrize("variant", [name for name in VARIANTS if Router.variants[name].empty_slots])
def test_thresholds_are_kept_through_compiled_recomputation(variant):
    """A second computation that rounds differently must not open another expert, see `keep_decisions`."""
    config = config_of(variant, gradient_checkpointing=True, **{"moe.dispatch": "grouped_mm"})
    model = config.build(seed=0).to(CUDA, torch.bfloat16)
    _, plain = step(model)
    naive = config.override({"moe.dispatch": "naive"}).build(seed=0).to(CUDA)
    naive.load_state_dict(model.state_dict())
    _, exact = step(naive)
    plain = {name: grad.clone() for name, grad in plain.items()}
    _, grads = step(torch.compile(model, fullgraph=True))
    grads = {name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}
    for name, grad in grads.items():
        assert grad.isfinite().all(), name
        assert error(grad, exact[name]) < max(0.05, 1.5 * error(plain[name], exact[name])), name
