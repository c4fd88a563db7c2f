"""Mixture-of-depths against blocks that are run by hand on the chosen tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from blues.errors import ConfigError
from blues.inference.cache import Cache
from blues.model.attention.layer import Attention, make_view
from blues.model.attention.patterns import AdaptiveWindow, SlidingWindow
from blues.model.compute import COUNTS
from blues.model.context import Context
from blues.model.depth import DepthBlock, MixtureOfDepths
from blues.model.moe.routers import DocumentPools
from tests.model.examples import gradients, lively, small, tokens

MIXED = {"num_layers": 4, "moe__num_experts": 3}


def model_of(depth=None, **changes):
    return lively(small(**{**MIXED, **changes}).replace(depth=depth or MixtureOfDepths.Config(capacity=0.4)).build())


def by_hand(block: DepthBlock, x, model, chosen_BT, documents=None):
    """Row by row, the chosen tokens alone, with a dense mask of the pattern."""
    out = x.clone()
    for row in range(len(x)):
        index = chosen_BT[row].nonzero()[:, 0]
        if not len(index):
            continue
        view = make_view(
            model.rope if block.attention.rotates else None,
            block.attention.pattern,
            length=len(index),
            device=x.device,
            positions_BT=index[None],
            documents_BT=None if documents is None else documents[row : row + 1, index],
        )
        part = x[row : row + 1, index]
        context = Context(torch.zeros(1, len(index), dtype=torch.int64))
        middle = part + block.attention(block.attention_norm(part), view)
        whole = middle + block.feed(middle, context)[0]
        score = F.rms_norm(part, part.shape[-1:]) @ block.score.weight[0]
        out[row, index] = (part + score[..., None] * (whole - part))[0]
    return out


def chosen_by(block, x, training):
    normed = F.rms_norm(x, x.shape[-1:])
    if not training:
        return block.predictor(normed)[..., 0] > 0
    scores = normed @ block.score.weight[0]
    best = scores.topk(7, dim=1).indices  # ceil(0.4 * 16)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layers", ["DF", "FD"])
@pytest.mark.parametrize("pattern", ["causal", "sliding_window"])
@pytest.mark.parametrize("with_documents", [False, True])
def test_a_block_computes_the_chosen_tokens_alone(training, layers, pattern, with_documents):
    changes = {"attention__pattern": pattern, "moe__router": "softmax_top_k"}
    if pattern == "sliding_window":
        changes["attention__pattern.window"] = 3
    depth = MixtureOfDepths.Config(capacity=0.4, layers=layers)
    model = model_of(depth, **changes).double().train(training)
    number = layers.index("D")
    block = model.blocks[number]
    x = torch.randn(2, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    documents = torch.tensor([[0] * 5 + [1] * 11, [0] * 16]) if with_documents else None
    view = make_view(model.rope, block.attention.pattern, length=16, device=x.device, documents_BT=documents)
    context = Context(torch.zeros(2, 16, dtype=torch.int64), documents)
    y, routing, passing = block(x, view, context)
    chosen = chosen_by(block, x.detach(), training)
    expected = by_hand(block, x, model, chosen, documents)
    torch.testing.assert_close(y, expected)
    given = [x, *(p for name, p in block.named_parameters() if not name.startswith("predictor"))]
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), given) for o in (y, expected)), strict=True):
        torch.testing.assert_close(a, b)
    assert passing.block_tokens == 2 * int(chosen.sum(dim=1).max())
    assert (routing is not None) == (number == 1)
    if routing is not None:
        E = 3
        assert torch.equal((routing.ids_TK < E).any(dim=1), chosen.flatten())
        assert not routing.probs_TE[~chosen.flatten()].any()
        assert routing.logits_TE.logsumexp(dim=1)[~chosen.flatten()].abs().max() < 1e-6


def test_the_predictor_learns_who_is_chosen_without_touching_the_model():
    model = model_of().train()
    ids = tokens(model)
    output = model(ids[:, :-1], ids[:, 1:])
    plain = output.losses.total - output.losses.cross_entropy
    output.losses.total.backward()
    grads = gradients(model)
    assert all(grads[name].any() for name in grads if "predictor" in name or "score" in name) and plain > 0
    for parameter in model.parameters():
        parameter.grad = None
    again = model(ids[:, :-1], ids[:, 1:])
    torch.autograd.backward(again.losses.total)
    block = model.blocks[0]
    optimizer = torch.optim.Adam(block.predictor.parameters(), lr=0.01)
    x = torch.randn(8, 32, 32, generator=torch.Generator().manual_seed(0))
    view = make_view(model.rope, block.attention.pattern, length=32, device=x.device)
    context = Context(torch.zeros(8, 32, dtype=torch.int64))
    losses = []
    for _ in range(150):
        penalty = block(x, view, context)[2].penalty
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        losses.append(penalty.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("on", [False, True])
def test_every_parameter_has_a_gradient_and_counts_are_of_what_was_computed(on):
    model = model_of(gradient_checkpointing=on).train()
    ids = tokens(model)
    torch.manual_seed(0)
    output = model(ids[:, :-1], ids[:, 1:])
    output.losses.total.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    rows = [dict(zip(COUNTS, row, strict=True)) for row in output.compute_LC.tolist()]
    assert [row["block_tokens"] for row in rows] == [12, 30, 12, 30] and [row["tokens"] for row in rows] == [30] * 4
    assert [row["computed"] for row in rows] == [0, 60, 0, 60]
    metrics = model.compute_metrics(output.compute_LC.tolist(), 15)
    assert metrics["compute/layers"] == pytest.approx(0.7) and metrics["compute/layer_00/layers"] == pytest.approx(0.4)
    assert metrics["compute/flops_per_token"] == pytest.approx(model.flops_per_token(15), rel=1e-3)


@pytest.mark.parametrize("layers", ["DF", "FD", "D"])
@pytest.mark.parametrize("pieces", [[1] * 16, [9, 1, 1, 5]])
def test_decoding_with_a_cache_equals_one_full_forward(layers, pieces):
    model = model_of(MixtureOfDepths.Config(layers=layers)).double().eval()
    ids, parts = tokens(model), []
    cache = Cache(num_layers=4, rows=2, num_kv_heads=1, head_dim=8, capacity=4, dtype=torch.float64)
    computed = 0
    for piece in ids.split(pieces, dim=1):
        output = model(piece, cache=cache)
        parts.append(output.logits_BTV)
        computed += output.compute_LC[:, 1].sum().item()
        cache.advance([piece.shape[1]] * 2)
    whole = model(ids)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits_BTV, atol=1e-9, rtol=0)
    assert 0 < computed < 4 * 32


def test_rows_of_different_length_decode_as_alone():
    model = model_of(MixtureOfDepths.Config(layers="D")).double().eval()
    ids = tokens(model, length=12)
    cache = Cache(num_layers=4, rows=2, num_kv_heads=1, head_dim=8, capacity=4, dtype=torch.float64)
    model(ids[:, :8], cache=cache)
    cache.advance([8, 5])  # the second row's last three were padding
    step = torch.stack([ids[0, 8:10], ids[1, 5:7]])
    logits = model(step, cache=cache, positions=cache.positions(2)).logits_BTV
    for row, end in ((0, 10), (1, 7)):
        alone = model(ids[row : row + 1, :end]).logits_BTV[0, -2:]
        torch.testing.assert_close(logits[row], alone, atol=1e-9, rtol=0)


def test_evaluation_looks_at_no_later_token():
    model = model_of().double().eval()
    ids = tokens(model)
    later = ids.clone()
    later[:, 10:] = tokens(model, seed=4)[:, 10:]
    first, second = (model(given).logits_BTV[:, :10] for given in (ids, later))
    torch.testing.assert_close(first, second, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("words", "changes", "depth"),
    [
        ("needs all of them", {"attention": Attention.Config(pattern=AdaptiveWindow.Config(window=8, ramp=2))}, {}),
        ("attention.backend=flash2", {"attention": Attention.Config(backend="flash2")}, {}),
        ("reach no D", {"num_layers": 1}, {"layers": "FD"}),
    ],
)
def test_wrong_combinations_are_refused_with_the_reason(words, changes, depth):
    with pytest.raises(ConfigError, match=words):
        small().replace(depth=MixtureOfDepths.Config(**depth), **changes)


def test_pools_of_documents_are_refused_where_tokens_are_left_out():
    config = small()
    pools = config.replace(moe=config.moe.replace(router=DocumentPools.Config()))
    with pytest.raises(ConfigError, match="document_pools"):
        pools.replace(depth=MixtureOfDepths.Config(layers="FD"))
    pools.replace(depth=MixtureOfDepths.Config(layers="DF"))


def test_a_window_is_a_pattern_that_will_do():
    pattern = SlidingWindow.Config(window=4)
    small().replace(depth=MixtureOfDepths.Config(), attention=Attention.Config(pattern=pattern))


@pytest.mark.parametrize(("field", "value"), [("capacity", 0), ("layers", "FF"), ("predictor_weight", 0)])
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"^{field}"):
        MixtureOfDepths.Config(**{field: value})
