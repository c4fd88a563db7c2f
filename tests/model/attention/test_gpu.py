"""Patterns on a GPU: FlexAttention skips the blocks that a pattern leaves out, and gives what the dense mask gives.

`pytest -m gpu tests/model/attention/test_gpu.py` on a machine with a GPU; float32, so that a key too many shows.
"""

from __future__ import annotations

import pytest
import torch

from blues.model.attention.patterns import (
    AllOf,
    BlockSparse,
    ByHead,
    ByLayer,
    Causal,
    Dilated,
    GlobalTokens,
    PrefixSyntax,
    SlidingWindow,
)
from tests.kernels.gpu import CUDA, NEEDS_CUDA, error
from tests.model.attention.patterns import HEADS, random_tree
from tests.model.examples import lively, small

pytestmark = NEEDS_CUDA
LENGTH = 500
BITING = [
    SlidingWindow.Config(window=100, sinks=4),
    GlobalTokens.Config(window=50, tokens=2, every=90),
    Dilated.Config(segments=(64, 256), dilations=(1, 5)),
    BlockSparse.Config(block=32, near=1, first=1, random=2, seed=3),
    HEADS.replace(block=100),
    AllOf.Config(patterns=(HEADS.replace(block=100), SlidingWindow.Config(window=200))),
    ByHead.Config(patterns=(SlidingWindow.Config(window=60), Causal.Config())),
    ByLayer.Config(patterns=(SlidingWindow.Config(window=60), Causal.Config())),
    PrefixSyntax.Config(window=20),
]


def model_of(pattern, backend):
    config = small(num_layers=2, attention__head_dim=32, attention__backend=backend, max_seq_len=512, moe=None)
    config = config.replace(attention=config.attention.replace(pattern=pattern))
    return lively(config.build(), std=0.15).to(CUDA)


@pytest.mark.parametrize("packed", [False, True], ids=["row", "documents"])
@pytest.mark.parametrize("pattern", BITING, ids=lambda pattern: pattern._variant)
def test_flex_attention_gives_what_the_dense_mask_gives_forward_and_gradient(pattern, packed):
    generator = torch.Generator(CUDA).manual_seed(0)
    ids = torch.randint(97, (2, LENGTH + 1), generator=generator, device=CUDA)
    options = {}
    if packed:
        options["documents"] = torch.arange(LENGTH, device=CUDA).div(170, rounding_mode="floor").expand(2, -1)
    if pattern.build().needs_tree:
        options["tree"] = type(tree := random_tree(2, LENGTH))(*(x.to(CUDA) for x in tree))
    results = []
    for backend in ("flex", "naive"):
        model = model_of(pattern, backend)
        model(ids[:, :-1], ids[:, 1:], **options).losses.total.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        with torch.no_grad():
            results.append({"logits": model(ids[:, :-1], **options).logits_BTV, **grads})
    for name, exact in results[1].items():
        assert error(results[0][name], exact) < 2e-3, name


def test_a_block_mask_is_made_once():
    model = model_of(SlidingWindow.Config(window=100, sinks=4), "auto")
    ids = torch.randint(97, (1, LENGTH), device=CUDA)
    for _ in range(3):
        model(ids, ids).losses.total.backward()
    assert model.block_masks.counts()[:4] == (2, 1, 0, 1)
