"""Reading in chunks is reading the whole: losses, gradients, statistics; and memory that stays that of a chunk."""

from __future__ import annotations

import pytest
import torch

from blues.errors import ConfigError
from blues.model.moe.layer import mixtures
from blues.training.memory import LiveBytes, peak_bytes
from tests.model.examples import gradients, lively, small, tokens

QUIET = {"moe__router": "softmax_top_k"}
"""Noise of routers is drawn chunk by chunk."""


def pair(chunk, *, dtype=torch.float64, **changes):
    """The same lively model, whole and in chunks."""
    config = small(**QUIET | changes)
    models = [c.build(seed=0).to(dtype) for c in (config, config.replace(sequence_chunk=chunk))]
    return [lively(model).train() for model in models]


def step(model, ids, **options):
    model.zero_grad()
    torch.manual_seed(3)
    output = model(ids[:, :-1], ids[:, 1:], **options)
    output.losses.total.backward()
    return output, gradients(model)


def assert_same(whole, chunked, **tolerance):
    (first, first_gradients), (second, second_gradients) = whole, chunked
    torch.testing.assert_close(second.losses, first.losses, **tolerance)
    for a, b in zip(first.routing, second.routing, strict=True):
        assert torch.equal(a.ids_TK, b.ids_TK)
        torch.testing.assert_close(b.logits_TE, a.logits_TE, **tolerance)
    torch.testing.assert_close(second_gradients, first_gradients, **tolerance)


VARIANTS = {
    "causal": {},
    "checkpointed": {"gradient_checkpointing": True},
    "window": {"attention__pattern": "sliding_window", "attention__pattern__window": 7},
    "sinks": {
        "attention__pattern": "sliding_window",
        "attention__pattern__window": 5,
        "attention__pattern__sinks": 2,
    },
    "by_head": {"attention__pattern": "by_head"},
    "spans": {"attention__pattern": "adaptive_window", "attention__pattern__window": 12},
    "dynamic_ntk": {"attention__rope": "dynamic_ntk", "max_seq_len": 16},
    "nope_layers": {"attention__rope_layers": "RN", "attention__num_kv_heads": 2},
    "untied_dense": {"moe": None, "tie_embeddings": False},
    "sequence_scope": {"moe__load_balancing_scope": "sequence", "moe__load_balancing_weight": 1.0},
    "sigmoid_bias": {"moe__router": "sigmoid_bias"},
    "threshold": {"moe__router": "threshold"},
    "skip_light": {"moe__rules": [{"variant": "skip_light", "in_training": True, "beta": 0.8}]},
    "null_experts": {"moe__null_experts": "zero_copy_constant"},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("documents", [False, True])
def test_chunks_equal_the_whole_forward_and_gradient(name, documents):
    whole, chunked = pair(8, **VARIANTS[name])
    ids = tokens(whole, length=31)  # 30 tokens: the last chunk is shorter
    options = {"documents": torch.randint(3, (2, 30)).sort(dim=1).values} if documents else {}
    results = [step(model, ids, **options) for model in (whole, chunked)]
    assert_same(*results, atol=1e-10, rtol=1e-9)
    for (_, moe), *routings in zip(mixtures(whole), *(output.routing for output, _ in results), strict=True):
        first, second = map(moe.statistics, routings)
        torch.testing.assert_close(second, first)


@pytest.mark.parametrize("chunk", [1, 5, 15, 29, 30, 100])
def test_any_chunk_in_float32(chunk):
    whole, chunked = pair(chunk, dtype=torch.float32)
    ids = tokens(whole, length=31)
    assert_same(step(whole, ids), step(chunked, ids), atol=2e-5, rtol=2e-4)


def test_evaluation_and_logits_are_those_of_the_whole():
    whole, chunked = (model.eval() for model in pair(8))
    ids = tokens(whole, length=30)
    with torch.no_grad():
        torch.testing.assert_close(chunked(ids).logits_BTV, whole(ids).logits_BTV)
        last = chunked(ids, num_logits=1).logits_BTV
    torch.testing.assert_close(last, whole(ids, num_logits=1).logits_BTV)


def test_noise_is_the_same_when_a_chunk_is_read_again():
    """A second draw in the backward would give gradients of other experts than the loss."""
    _, model = pair(8, moe__router="noisy_top_k")
    ids = tokens(model, length=17)
    _, found = step(model, ids)
    direction = {name: torch.randn_like(gradient) for name, gradient in found.items()}
    expected = sum((found[name] * direction[name]).sum() for name in found)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(direction[name], alpha=sign * 1e-7)
        torch.manual_seed(3)
        values.append(model(ids[:, :-1], ids[:, 1:]).losses.total.item())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(direction[name], alpha=sign * 1e-7)
    assert (values[0] - values[1]) / 2e-7 == pytest.approx(expected.item(), rel=1e-4)


def growth(model, lengths=(64, 128)):
    """Bytes per token that a training step takes more at the greater length."""
    peaks = []
    for length in lengths:
        ids = tokens(model, batch=1, length=length + 1)
        step(model, ids)  # gradients exist: they are no part of what grows
        peaks.append(peak_bytes(lambda ids=ids: step(model, ids)))
    return (peaks[1] - peaks[0]) / (lengths[1] - lengths[0])


def test_memory_grows_by_keys_and_values_alone():
    whole, chunked = pair(16, dtype=torch.float32, num_layers=2)
    _, both = pair(16, dtype=torch.float32, num_layers=2, gradient_checkpointing=True)
    without, with_blocks = growth(chunked), growth(both)
    assert without < growth(whole) / 2
    assert with_blocks < without, "the keys of one layer are put together at a time"


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_nothing_stays_in_memory(gradient_checkpointing, backward):
    """A graph that held what holds it would be freed by nobody."""
    _, model = pair(8, dtype=torch.float32, gradient_checkpointing=gradient_checkpointing)
    ids = tokens(model, length=33)
    step(model, ids)
    with LiveBytes() as counted:
        output = model(ids[:, :-1], ids[:, 1:])
        if backward:
            output.losses.total.backward()
        del output
        assert counted.live < 4096  # a few indices and scalars


def test_live_bytes_counts_what_is_held_and_forgets_what_is_freed():
    with LiveBytes() as counted:
        held = torch.zeros(1000)
        view = held.view(10, 100)
        held.add_(1)
        assert counted.live == 4000
        for _ in range(3):
            torch.zeros(500)
        assert (counted.live, counted.peak) == (4000, 6000)
        del held
        assert counted.live == 4000
        del view
    assert (counted.live, counted.peak) == (0, 6000)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sequence_chunk": 0}, "at least 1"),
        ({"moe__router": "expert_choice"}, "expert_choice, which lets each expert choose among all tokens"),
        ({"moe__router": "document_pools"}, "sums over all of a document"),
        ({"moe__router": "relu"}, "penalty on the mean load"),
        ({"moe__rules": [{"variant": "capacity_by_position"}]}, "rule capacity_by_position .* counts all tokens"),
        ({"moe__rules": [{"variant": "expert_dropout"}]}, "draws once for all tokens"),
        ({"attention__pattern": "prefix_syntax"}, "tree of the whole"),
        ({"depth": "mixture_of_depths"}, "compares all tokens"),
        ({"activation_offload": True}, "keeps no activations"),
        ({"cross_entropy_chunk": 0, "sequence_chunk": None}, "at least 1 token"),
        ({"cross_entropy_chunk": 64, "cross_entropy": "naive"}, "cross_entropy be chunked"),
    ],
)
def test_what_needs_the_whole_sequence_is_refused(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        small(**{"sequence_chunk": 8} | changes)


def test_positions_of_ones_own_are_refused():
    _, model = pair(8)
    ids = tokens(model, length=20)
    with pytest.raises(ValueError, match="sequence_chunk"):
        model(ids, positions=torch.arange(20)[None])


def test_the_chunked_cross_entropy_takes_its_chunk_from_the_configuration():
    results = []
    for chunk in (None, 3):
        model = lively(small(**QUIET, cross_entropy_chunk=chunk).build(seed=0).double())
        results.append(step(model, tokens(model, length=20)))
    assert_same(*results)
