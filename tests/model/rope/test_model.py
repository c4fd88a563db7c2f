"""Rotary embeddings within a model: rotated in some layers, decoded with a cache, compiled, converted, copied."""

import copy

import pytest
import torch

from blues.errors import ConfigError
from blues.inference.cache import Cache
from blues.model.attention.layer import Attention
from blues.model.rope import NoPE, RotaryEmbedding
from blues.model.transformer import Transformer
from tests.model.examples import gradients, lively, small, tokens
from tests.model.rope.test_variants import VARIANTS

BY_LENGTH = ("dynamic_ntk", "longrope")
ROPES = [(name, "R") for name in VARIANTS] + [("yarn", "RN"), ("plain", "RRRN"), ("longrope", "NR")]


def model_of(rope, layers="R", **changes) -> Transformer:
    return lively(small(attention__rope=rope, attention__rope_layers=layers, **changes).build())


def decode(model, ids, pieces):
    """Logits of all tokens, read piece by piece with a cache that starts too small."""
    cache = Cache(
        num_layers=model.config.num_layers, rows=len(ids), num_kv_heads=1, head_dim=8, capacity=3, dtype=torch.float64
    )
    parts = []
    for piece in ids.split(pieces, dim=1):
        parts.append(model(piece, cache=cache).logits_BTV)
        cache.advance([piece.shape[1]] * len(ids))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(("rope", "layers"), ROPES)
@pytest.mark.parametrize("pieces", [[1] * 24, [5, 1, 1, 17]])
def test_decoding_piece_by_piece_equals_one_forward_over_the_whole(rope, layers, pieces):
    """At any depth; those that go by the length within the original one, which is 32 here."""
    config = {"variant": rope, "original_length": 32} if rope in BY_LENGTH else rope
    model = model_of(config, layers).double().eval()
    ids = tokens(model, length=24)
    torch.testing.assert_close(decode(model, ids, pieces), model(ids).logits_BTV, atol=1e-9, rtol=0)


@pytest.mark.parametrize("rope", VARIANTS)
def test_at_every_length_a_decoded_token_sees_all_keys_under_the_rotation_of_that_length(rope):
    """One layer, whose keys come from the tokens alone: each step equals a forward over just the text so far."""
    model = model_of(rope, num_layers=1, moe=None).double().eval()  # original length 16
    ids = tokens(model, batch=1, length=40)
    decoded_1TV = decode(model, ids, 1)
    whole = [model(ids[:, :length]).logits_BTV[:, -1:] for length in range(1, 41)]
    torch.testing.assert_close(decoded_1TV, torch.cat(whole, dim=1), atol=1e-9, rtol=0)


@pytest.mark.parametrize("rope", BY_LENGTH)
def test_beyond_the_original_length_the_rotation_changes_for_earlier_keys_too(rope):
    model = model_of(rope, num_layers=1, moe=None).double().eval()
    ids = tokens(model, batch=1, length=40)
    short, long = model(ids[:, :16]).logits_BTV, model(ids).logits_BTV
    assert not torch.allclose(short, long[:, :16], atol=1e-3)


def test_rope_layers_says_which_layers_rotate():
    model = small(attention__rope="yarn", attention__rope_layers="RRRN", num_layers=8).build()
    assert [layer.rotates for layer in model.attentions] == [True, True, True, False] * 2
    assert not any(layer.rotates for layer in small(attention__rope="nope").build().attentions)


def test_layers_without_rotation_do_not_see_positions():
    """Without rotation, and without a mask's help, attention is blind to the order of the tokens before the last."""
    ids = tokens(small().build(), batch=1, length=9)
    other = torch.cat([ids[:, :8].flip(1), ids[:, 8:]], dim=1)
    results = {}
    for rope, layers in (("nope", "R"), ("plain", "R")):
        model = model_of(rope, layers, num_layers=1, moe=None).eval()
        results[rope] = [model(x).logits_BTV[0, -1] for x in (ids, other)]
    torch.testing.assert_close(*results["nope"], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(*results["plain"], atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_layers": ""}, "rope_layers: must be a cycle of R and N with an R in it"),
        ({"rope_layers": "RX"}, "rope_layers: .* got 'RX'"),
        ({"rope_layers": "NN"}, "rope_layers: .*rope=nope rotates no layer"),
        ({"rope_layers": "RN", "rope": NoPE.Config()}, "rope_layers: RN has no meaning with rope=nope"),
    ],
)
def test_wrong_cycles_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Attention.Config(**changes)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"variant": "longrope", "long_factor": [1.0, 2.0]}, "attention.rope.long_factor: .* 4 pairs .* got 2"),
        ({"variant": "yarn", "original_length": 128}, "attention.rope.original_length: 128 .*max_seq_len"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_built(rope, message):
    with pytest.raises(ConfigError, match=message):
        small(attention__rope=rope)


@pytest.mark.parametrize("rope", VARIANTS)
def test_the_model_compiles_without_a_graph_break(rope):
    model = model_of(rope, "R", num_layers=1, moe=None)
    ids = tokens(model, length=41)
    plain = model(ids[:, :-1], ids[:, 1:]).losses.total
    losses = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)(ids[:, :-1], ids[:, 1:]).losses
    losses.total.backward()
    torch.testing.assert_close(losses.total, plain, atol=1e-6, rtol=1e-6)
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    torch.compiler.reset()


@pytest.mark.parametrize("rope", VARIANTS)
def test_one_compiled_graph_rotates_texts_of_any_length(rope):
    built = model_of(rope).rope
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x: built(torch.arange(x.shape[1])[None], x.shape[1]), fullgraph=True, backend=count, dynamic=True
    )
    for length in (40, 10, 17, 63):
        computed = built.compute(torch.arange(length)[None], length)
        for got, expected in zip(compiled(torch.empty(1, length)), computed, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert len(graphs) <= (2 if rope in BY_LENGTH else 1)
    torch.compiler.reset()


def test_one_table_serves_all_layers_and_every_forward(monkeypatch):
    model = model_of("yarn").eval()
    made = []
    compute = RotaryEmbedding.compute
    monkeypatch.setattr(RotaryEmbedding, "compute", lambda *given: made.append(given) or compute(*given))
    ids = tokens(model, length=16)
    for length in (16, 9, 16, 1):
        model(ids[:, :length])
    assert len(made) == 1 and len(model.rope.tables) == 1
    copied = copy.deepcopy(model)
    assert len(copied.rope.tables) == 0
    assert torch.equal(copied(ids).logits_BTV, model(ids).logits_BTV)


@pytest.mark.parametrize("rope", VARIANTS)
def test_tables_are_no_part_of_the_state_and_are_not_rounded(rope):
    model = model_of(rope).eval()
    ids = tokens(model)
    model(ids)
    assert model.state_dict().keys() == small().build().state_dict().keys()
    exact = model.rope(torch.arange(16)[None], 16)
    converted = model.bfloat16()
    converted(ids)
    rotation = converted.rope(torch.arange(16)[None], 16)
    assert rotation.cos_BTP.dtype == torch.float32 and torch.equal(rotation.cos_BTP, exact.cos_BTP)


@pytest.mark.parametrize("rope", VARIANTS)
def test_a_model_without_weights_is_made_and_filled(rope):
    whole = model_of(rope).eval()
    with torch.device("meta"):
        empty = Transformer(whole.config).eval()
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(whole.state_dict())
    ids = tokens(whole)
    assert torch.equal(filled(ids).logits_BTV, whole(ids).logits_BTV)


@pytest.mark.parametrize("rope", VARIANTS)
def test_shifted_positions_give_the_same_logits(rope):
    """Scores depend on distances alone; the length that counts is that of the last position."""
    config = {"variant": rope, "original_length": 64} if rope in BY_LENGTH else rope
    model = model_of(config).double().eval()
    ids = tokens(model, length=12)
    shifted = model(ids, positions=torch.arange(20, 32)[None]).logits_BTV
    torch.testing.assert_close(shifted, model(ids).logits_BTV, atol=2e-3, rtol=1e-3)
