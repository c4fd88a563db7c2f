"""Every pattern in a whole model on CUDA, on the backend that `auto` picks, against naive float32: forward, gradient,
documents and decoding. `pytest -m gpu tests/model/attention/test_patterns_gpu.py`."""

from __future__ import annotations

import pytest
import torch

from blues.inference.cache import Cache
from blues.model.attention.patterns import TokenTree
from tests.kernels.gpu import CUDA, NEEDS_CUDA, error
from tests.model.attention.patterns import ALL, name_of, random_tree
from tests.model.examples import gradients, lively, small, tokens

pytestmark = NEEDS_CUDA

LENGTH = 200
everyone = pytest.mark.parametrize("config", ALL, ids=name_of)


def model_of(pattern, backend, dtype):
    """4 query heads on 1 KV head of 64; without mixtures, for a token may change its expert by rounding."""
    config = small(num_layers=2, moe=None, attention__head_dim=64, max_seq_len=256)
    config = config.replace(attention=config.attention.replace(pattern=pattern, backend=backend))
    return lively(config.build(), std=0.1).to(CUDA, dtype)


def inputs_of(model, upto=LENGTH):
    given = {}
    if model.pattern.needs_tree:
        given["tree"] = TokenTree(*(x.to(CUDA) for x in random_tree(2, upto, whole=LENGTH)))
    return tokens(model, length=LENGTH).to(CUDA), given


def step(pattern, backend, dtype, state=None, documents=None):
    model = model_of(pattern, backend, dtype)
    if state is not None:
        model.load_state_dict(state)
    ids, given = inputs_of(model)
    losses = model(ids, ids.roll(-1, 1), documents=documents, **given).losses
    losses.total.backward()
    return losses.cross_entropy.detach(), gradients(model), model.state_dict()


@pytest.mark.parametrize("documents", [False, True], ids=["one_text", "documents"])
@everyone
def test_training_on_the_automatic_backend_agrees_with_naive_float32(config, documents):
    numbers = torch.arange(LENGTH, device=CUDA).div(70, rounding_mode="floor").expand(2, -1) if documents else None
    if documents and config.build().needs_tree:
        numbers = None  # a tree of one document says nothing of several
    fast_loss, fast, state = step(config, "auto", torch.bfloat16, documents=numbers)
    _, naive, _ = step(config, "naive", torch.bfloat16, documents=numbers)
    exact_loss, exact, _ = step(config, "naive", torch.float32, state, documents=numbers)
    assert abs(fast_loss - exact_loss) < 0.01 * exact_loss
    for name in exact:
        assert fast[name].isfinite().all(), name
        off, naive_off = error(fast[name], exact[name]), error(naive[name], exact[name])
        assert off < max(0.03, 1.5 * naive_off), (name, off, naive_off)


@everyone
def test_decoding_on_the_automatic_backend_agrees_with_naive_float32(config):
    fast = model_of(config, "auto", torch.bfloat16).eval()
    exact = model_of(config, "naive", torch.float32).eval()
    exact.load_state_dict(fast.state_dict())
    ids, given = inputs_of(exact)
    cache = Cache(num_layers=2, rows=2, num_kv_heads=1, head_dim=64, capacity=LENGTH, dtype=torch.bfloat16, device=CUDA)
    with torch.no_grad():
        whole, parts, start = exact(ids, **given).logits_BTV, [], 0
        for piece in (LENGTH - 20, 1, 1, 6, *[1] * 12):
            end = start + piece
            parts.append(fast(ids[:, start:end], cache=cache, **inputs_of(fast, end)[1]).logits_BTV)
            cache.advance([piece] * 2)
            start = end
    assert error(torch.cat(parts, dim=1), whole) < 0.03
