"""Early exit against every layer of every token, computed and then left out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blues.errors import ConfigError
from blues.inference.cache import Cache
from blues.model.attention.layer import Attention, make_views
from blues.model.attention.patterns import AdaptiveWindow
from blues.model.block import Block
from blues.model.compute import COUNTS
from blues.model.context import Context
from blues.model.depth import EarlyExit, MixtureOfDepths, confidence
from blues.model.moe.routers import DocumentPools
from tests.model.examples import gradients, lively, small, tokens

MIXED = {"num_layers": 4, "moe__num_experts": 3, "moe__router": "softmax_top_k"}


def model_of(changes=None, **depth):
    depth = EarlyExit.Config(**{"exits": (0, 1, 2), "threshold": 0.03, **depth})
    return lively(small(**{**MIXED, **(changes or {})}).replace(depth=depth).build())


def by_hand(model, ids, documents=None):
    """Logits, and who left behind each layer: all blocks compute all tokens, and those that have left stay as they
    are. Their keys are then those of the stream that they left with."""
    layers = [(model.rope if a.rotates else None, a.pattern) for a in model.attentions]
    views = make_views(layers, length=ids.shape[1], device=ids.device, documents_BT=documents)
    x, left, when = model.embedding(ids), torch.zeros_like(ids, dtype=torch.bool), []
    head = model.embedding.weight if model.head is None else model.head.weight
    for number, (block, view) in enumerate(zip(model.blocks, views, strict=True)):
        y, _ = Block.forward(block, x, view, Context(ids, documents))
        x = torch.where(left[..., None], x, y)
        if number in model.depth.exits:
            two = (model.norm(x) @ head.T).softmax(dim=-1).topk(2).values
            left = left | (two[..., 0] - two[..., 1] > model.depth.config.threshold)
        when.append(left)
    return model.norm(x) @ head.T, torch.stack(when)


def share(x):
    return x.double().mean().item()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pattern", ["causal", "sliding_window", "adaptive_window"])
@pytest.mark.parametrize("with_documents", [False, True])
def test_tokens_that_left_change_no_more_and_give_later_layers_their_keys(tied, pattern, with_documents):
    changes = {"attention__pattern": pattern, "tie_embeddings": tied}
    if pattern == "sliding_window":
        changes["attention__pattern.window"] = 3
    model = model_of(changes).double().eval()
    ids = tokens(model)
    documents = torch.tensor([[0] * 5 + [1] * 11, [0] * 16]) if with_documents else None
    output = model(ids, documents=documents)
    expected, when = by_hand(model, ids, documents)
    assert all(0.05 < share(left) < 0.95 for left in when[1:3])
    torch.testing.assert_close(output.logits_BTV, expected)
    weights = list(model.parameters())
    found = [torch.autograd.grad(o.square().sum(), weights, allow_unused=True) for o in (output.logits_BTV, expected)]
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        torch.testing.assert_close(a, b)
    computed = [2 * int((~left).sum(dim=1).max()) for left in when[:-1]]
    assert output.compute_LC[:, COUNTS.index("block_tokens")].tolist() == [32, *computed]
    for routing, left in zip(output.routing, (when[0], when[2]), strict=True):
        assert torch.equal((routing.ids_TK < 3).any(dim=1), ~left.flatten())


@pytest.mark.parametrize("pieces", [[1] * 16, [9, 1, 1, 5]])
@pytest.mark.parametrize(("kind", "threshold"), [("margin", 0.03), ("probability", 0.1), ("entropy", 0.12)])
def test_decoding_with_a_cache_equals_one_full_forward(pieces, kind, threshold):
    model = model_of(confidence=kind, threshold=threshold).double().eval()
    ids, parts, computed = tokens(model), [], 0
    cache = Cache(num_layers=4, rows=2, num_kv_heads=1, head_dim=8, capacity=4, dtype=torch.float64)
    for piece in ids.split(pieces, dim=1):
        output = model(piece, cache=cache)
        parts.append(output.logits_BTV)
        computed += output.compute_LC[:, 1].sum().item()
        cache.advance([piece.shape[1]] * 2)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits_BTV, atol=1e-9, rtol=0)
    assert 32 < computed < 4 * 32


def test_rows_of_different_length_decode_as_alone():
    model = model_of().double().eval()
    ids = tokens(model, length=12)
    cache = Cache(num_layers=4, rows=2, num_kv_heads=1, head_dim=8, capacity=4, dtype=torch.float64)
    model(ids[:, :8], cache=cache)
    cache.advance([8, 5])  # the second row's last three were padding
    step = torch.stack([ids[0, 8:10], ids[1, 5:7]])
    logits = model(step, cache=cache, positions=cache.positions(2)).logits_BTV
    for row, end in ((0, 10), (1, 7)):
        alone = model(ids[row : row + 1, :end]).logits_BTV[0, -2:]
        torch.testing.assert_close(logits[row], alone, atol=1e-9, rtol=0)


def test_where_all_leave_at_once_the_head_reads_the_first_exit():
    model = model_of(threshold=0.0).double().eval()
    ids = tokens(model)
    expected, when = by_hand(model, ids)
    assert when.all()
    cache = Cache(num_layers=4, rows=2, num_kv_heads=1, head_dim=8, capacity=4, dtype=torch.float64)
    output = model(ids, cache=cache)
    torch.testing.assert_close(output.logits_BTV, expected)
    assert output.compute_LC[:, COUNTS.index("block_tokens")].tolist() == [32, 0, 0, 0]
    assert all(k_BSGC.any() for k_BSGC in cache.k_LBSGC)  # deeper layers have their keys all the same


@pytest.mark.parametrize("threshold", [1.0, 0.999999])
def test_where_nobody_leaves_it_is_the_plain_model_bit_for_bit(threshold):
    early = lively(small().replace(depth=EarlyExit.Config(threshold=threshold)).build(), std=0.02).eval()
    plain = small().build().eval()
    plain.load_state_dict(early.state_dict())
    ids = tokens(plain)
    assert torch.equal(early(ids).logits_BTV, plain(ids).logits_BTV)
    one, other = (model(ids[:, :-1], ids[:, 1:]).losses for model in (early, plain))
    assert torch.equal(one.total, other.total) and one.exit_loss == 0
    trained = []
    for model in (early, plain):
        torch.manual_seed(0)
        trained.append(model.train()(ids[:, :-1], ids[:, 1:]).losses)
    assert torch.equal(trained[0].cross_entropy, trained[1].cross_entropy) and trained[0].exit_loss > 0


@pytest.mark.parametrize(("weights", "expected"), [("linear", [1 / 6, 2 / 6, 3 / 6]), ("quadratic", [0.1, 0.3, 0.6])])
@pytest.mark.parametrize("on", [False, True])
def test_training_adds_the_loss_of_every_exit_and_every_parameter_has_its_gradient(weights, expected, on):
    model = model_of({"gradient_checkpointing": on, "moe": None}, weights=weights, exit_weight=0.7).double().train()
    ids = tokens(model)
    losses = model(ids[:, :-1], ids[:, 1:], num_targets=40).losses
    losses.total.backward()
    found = gradients(model)
    model.zero_grad()
    view = make_views([(model.rope, model.pattern)], length=15, device=ids.device)[0]
    x, wanted = model.embedding(ids[:, :-1]), []
    for block in model.blocks:
        x, _ = Block.forward(block, x, view, Context(ids[:, :-1]))
        logits = model.norm(x) @ model.embedding.weight.T
        wanted.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / 40)
    exits = sum(weight * loss for weight, loss in zip(expected, wanted, strict=False))
    torch.testing.assert_close(losses.exit_loss, exits.detach())
    torch.testing.assert_close(losses.total, wanted[-1] + 0.7 * exits)
    torch.testing.assert_close(losses.cross_entropy, wanted[-1].detach())
    (wanted[-1] + 0.7 * exits).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient)


def test_training_computes_every_layer_and_its_operations_count_the_exits():
    model, plain = model_of().train(), small(**MIXED).build()
    ids = tokens(model)
    metrics = model.compute_metrics(model(ids[:, :-1], ids[:, 1:]).compute_LC.tolist(), 15)
    assert metrics["compute/layers"] == 1
    assert metrics["compute/flops_per_token"] == pytest.approx(model.flops_per_token(15), rel=1e-3)
    assert model.flops_per_token(15) - plain.flops_per_token(15) == 3 * 6 * 98 * 32
    assert model.num_active_parameters() == plain.num_active_parameters()


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=9))
@settings(max_examples=30, deadline=None)
def test_confidence_lies_between_the_even_and_the_certain(logits):
    given_NV = torch.tensor([logits, [0.0] * len(logits), [90.0, *[0.0] * (len(logits) - 1)]], dtype=torch.float64)
    for kind, least in (("margin", 0), ("probability", 1 / len(logits)), ("entropy", 0)):
        some, even, certain = confidence(given_NV, kind).tolist()
        assert even == pytest.approx(least, abs=1e-12) and certain == pytest.approx(1)
        assert least - 1e-12 <= some <= 1 + 1e-12


def test_exits_follow_from_the_depth_where_they_are_not_named():
    def exits(num_layers, **changes):
        return EarlyExit.Config(**changes).build(num_layers=num_layers).exits

    assert exits(12) == (2, 5, 8) and exits(2) == (0,) and exits(5, every=2) == (1, 3) and exits(9, exits=(4,)) == (4,)


@pytest.mark.parametrize(
    ("words", "changes", "depth"),
    [
        ("exits=.0, 3.*from 0 to 2", {}, {"exits": (0, 3)}),
        ("exits=.-1", {}, {"exits": (-1, 2)}),
        ("every=4", {}, {"every": 4}),
        ("at least 2 layers", {"num_layers": 1}, {}),
        ("attention.backend=flash2", {"attention": Attention.Config(backend="flash2")}, {}),
        ("sequence_chunk cannot go with depth=early_exit, which takes losses", {"sequence_chunk": 8}, {}),
    ],
)
def test_wrong_combinations_are_refused_with_the_reason(words, changes, depth):
    with pytest.raises(ConfigError, match=words):
        small().replace(depth=EarlyExit.Config(**depth), **changes)


def test_trees_and_pools_are_refused_only_behind_an_exit():
    config = small()
    with pytest.raises(ConfigError, match="reads a tree"):
        config.override({"attention.pattern": "prefix_syntax", "depth": "early_exit"})
    pools = config.replace(moe=config.moe.replace(router=DocumentPools.Config(), every=4))
    with pytest.raises(ConfigError, match="document_pools"):
        pools.replace(depth=EarlyExit.Config())
    pattern = AdaptiveWindow.Config(window=8, ramp=2)
    config.replace(depth=EarlyExit.Config(), attention=Attention.Config(pattern=pattern))


@pytest.mark.parametrize(
    ("field", "value"),
    [("exits", (2, 1)), ("every", 0), ("exit_weight", 0), ("threshold", 1.5), ("threshold", -0.1)],
)
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"^{field}"):
        EarlyExit.Config(**{field: value})


def test_one_choice_of_depth_takes_the_place_of_another():
    config = small().replace(depth=MixtureOfDepths.Config()).override({"depth": "early_exit", "depth.threshold": 0.5})
    assert config.depth == EarlyExit.Config(threshold=0.5)
    with pytest.raises(ConfigError, match="capacity"):
        config.override({"depth.capacity": 0.5})
