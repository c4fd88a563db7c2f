"""Every pattern in a whole model: token by token, rows of different lengths, documents, trees, learned spans."""

from __future__ import annotations

import pytest
import torch

from blues.errors import ConfigError
from blues.inference.cache import Cache
from blues.kernels.attention import dense_mask
from blues.model.attention.layer import make_view
from blues.model.attention.masks import BlockMasks
from blues.model.attention.patterns import AdaptiveWindow, ByLayer, Causal, PrefixSyntax, SlidingWindow, TokenTree
from blues.model.attention.span import LearnedSpan
from blues.model.transformer import Transformer
from tests.model.attention.patterns import ALL, PATTERNS, name_of, random_tree
from tests.model.examples import gradients, lively, small, tokens

LENGTH = 30
everyone = pytest.mark.parametrize("config", ALL, ids=name_of)


def model_of(pattern, **changes) -> Transformer:
    config = small(num_layers=2, **changes)
    config = config.replace(attention=config.attention.replace(pattern=pattern))
    return lively(config.build()).double().eval()


def cache_of(model, rows):
    return Cache(num_layers=2, rows=rows, num_kv_heads=1, head_dim=8, capacity=LENGTH, dtype=torch.float64)


def trees(model, rows, upto, seed=0) -> dict[str, TokenTree]:
    """The tree of the first `upto` tokens of a text of LENGTH, for patterns that need one."""
    return {"tree": random_tree(rows, upto, seed, whole=LENGTH)} if model.pattern.needs_tree else {}


@everyone
def test_decoding_equals_the_whole_forward(config):
    model = model_of(config)
    ids = tokens(model, length=LENGTH)
    whole = model(ids, **trees(model, 2, LENGTH)).logits_BTV
    cache, parts, start = cache_of(model, 2), [], 0
    for piece in (9, 1, 1, 6, *[1] * 13):
        end = start + piece
        parts.append(model(ids[:, start:end], cache=cache, **trees(model, 2, end)).logits_BTV)
        cache.advance([piece] * 2)
        start = end
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-10, rtol=0)


@everyone
def test_rows_of_different_lengths_decode_as_they_would_alone(config):
    model = model_of(config)
    ids, lengths = tokens(model, batch=3, length=LENGTH), [4, 11, 7]
    alone = [model(row[None], **trees(model, 1, LENGTH)).logits_BTV[0] for row in ids]
    cache, width = cache_of(model, 3), max(lengths)
    same_tree = (
        (lambda upto: {"tree": TokenTree(*(x.expand(3, -1) for x in random_tree(1, upto, whole=LENGTH)))})
        if (model.pattern.needs_tree)
        else (lambda upto: {})
    )
    prompt = torch.stack([torch.cat([row[:n], row.new_zeros(width - n)]) for row, n in zip(ids, lengths, strict=True)])
    logits = model(prompt, cache=cache, positions=cache.positions(width), **same_tree(width)).logits_BTV
    for row, n in enumerate(lengths):
        torch.testing.assert_close(logits[row, n - 1], alone[row][n - 1], atol=1e-10, rtol=0)
    cache.advance(lengths)
    for step in range(8):
        new = torch.stack([row[n + step] for row, n in zip(ids, lengths, strict=True)])[:, None]
        tree = same_tree(cache.length + 1)
        logits = model(new, cache=cache, positions=cache.positions(1), **tree).logits_BTV
        cache.advance([1] * 3)
        expected = torch.stack([alone[row][n + step] for row, n in enumerate(lengths)])
        torch.testing.assert_close(logits[:, 0], expected, atol=1e-10, rtol=0)


@everyone
def test_documents_side_by_side_are_read_as_they_would_be_alone(config):
    model = model_of(config)
    if model.pattern.needs_tree:
        pytest.skip("a tree of one document says nothing of several")
    ids, parts = tokens(model, batch=1, length=LENGTH), [11, 1, 18]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(parts))[None]
    together = model(ids, documents=documents).logits_BTV
    alone = torch.cat([model(part).logits_BTV for part in ids.split(parts, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)  # positions differ, so rotations round differently


@everyone
def test_block_masks_of_a_forward_say_what_its_dense_masks_say(config):
    pattern = config.build().for_layer(0)
    if pattern.is_soft:
        pytest.skip("learned spans are refused on FlexAttention")
    documents = torch.arange(LENGTH).div(11, rounding_mode="floor").expand(2, -1)
    needed = {"tree": random_tree(2, LENGTH)} if pattern.needs_tree else {}
    for options in (needed, {"documents_BT": documents, **needed}, {"positions_BT": torch.arange(3, 3 + LENGTH)[None]}):
        given = {"length": LENGTH, "device": torch.device("cpu"), "num_heads": 4, **needed, **options}
        dense = make_view(None, pattern, **given)
        blocks = make_view(None, pattern, **given, block_masks=BlockMasks())
        assert blocks.mask_BTS is None and (blocks.block_mask is not None or blocks.is_causal)
        shown = [dense_mask(view, LENGTH, LENGTH, torch.device("cpu")).expand(2, 4, -1, -1) for view in (dense, blocks)]
        assert torch.equal(*shown)


@pytest.mark.parametrize(
    "config", [SlidingWindow.Config(window=5), PATTERNS["by_head"][0], PATTERNS["prefix_syntax"][0]]
)
def test_flex_attention_reads_them(config):
    """Which torch runs unfused and without a gradient on CPU."""
    model, flex = model_of(config), model_of(config, attention__backend="flex")
    ids, tree = tokens(model, length=LENGTH), trees(model, 2, LENGTH)
    with torch.no_grad():
        whole = model(ids, **tree).logits_BTV
        torch.testing.assert_close(flex(ids, **tree).logits_BTV, whole, atol=1e-5, rtol=1e-5)
        cache, start = cache_of(flex, 2), 0
        for end in (9, 10, LENGTH):
            logits = flex(ids[:, start:end], cache=cache, **trees(model, 2, end)).logits_BTV
            torch.testing.assert_close(logits, whole[:, start:end], atol=1e-5, rtol=1e-5)
            cache.advance([end - start] * 2)
            start = end


@everyone
def test_gradients_equal_those_of_the_naive_backend(config):
    found = []
    for backend in ("auto", "naive"):
        model = model_of(config, attention__backend=backend, attention__num_kv_heads=2).train()
        ids = tokens(model, length=LENGTH + 1)
        torch.manual_seed(0)
        model(ids[:, :-1], ids[:, 1:], **trees(model, 2, LENGTH)).losses.total.backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-11, rtol=1e-7)


@everyone
def test_recomputation_changes_no_gradient(config):
    found = []
    for recompute in (False, True):
        model = model_of(config, gradient_checkpointing=recompute).train()
        ids = tokens(model, length=LENGTH + 1)
        torch.manual_seed(0)
        model(ids[:, :-1], ids[:, 1:], **trees(model, 2, LENGTH)).losses.total.backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-12, rtol=1e-9)


def test_a_tree_must_be_there_and_have_every_token():
    model = model_of(PrefixSyntax.Config(window=2))
    with pytest.raises(ConfigError, match="prefix_syntax needs a tree of the tokens, and none came with them"):
        model(tokens(model))
    with pytest.raises(ValueError, match="tree: has 15 and 15 tokens per row, needs one for each of the 16"):
        model(tokens(model), tree=random_tree(2, 15))


def soft_reference(scores_HTS: torch.Tensor, z_H: torch.Tensor, ramp: int) -> torch.Tensor:
    """Equation 3 of arXiv 1905.07799, entry by entry."""
    H, T, S = scores_HTS.shape
    probs_HTS = torch.zeros_like(scores_HTS)
    for h in range(H):
        for t in range(T):
            m = [min(max((ramp + z_H[h].item() - (t - s)) / ramp, 0), 1) if s <= t else 0.0 for s in range(S)]
            weights = torch.tensor(m, dtype=torch.float64) * scores_HTS[h, t].exp()
            probs_HTS[h, t] = weights / weights.sum()
    return probs_HTS


def test_learned_spans_weigh_keys_as_in_the_paper_and_have_its_gradient():
    span = LearnedSpan(AdaptiveWindow.Config(window=20, ramp=4, initial=0.3), 3).double()
    with torch.no_grad():
        span.raw_H.copy_(torch.tensor([-3.0, -0.4, 0.5]))
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 12, 12, generator=generator, dtype=torch.float64)
    positions = torch.arange(12)[None]
    causal = torch.ones(1, 12, 12, dtype=torch.bool).tril()

    def probs(raw_H):
        return (scores + torch.func.functional_call(span, {"raw_H": raw_H}, (positions, positions, causal))).softmax(-1)

    raw_H = span.raw_H.detach().clone().requires_grad_()
    torch.testing.assert_close(probs(raw_H)[0], soft_reference(scores, span.spans(), 4), atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(probs, (raw_H,))
    wide = torch.full((3,), 30.0, dtype=torch.float64)
    torch.testing.assert_close(probs(wide)[0], scores.masked_fill(~causal[0], -torch.inf).softmax(-1))


def test_the_penalty_shortens_spans_and_is_reported():
    pattern = ByLayer.Config(patterns=(AdaptiveWindow.Config(window=16, ramp=4, span_penalty=0.25), Causal.Config()))
    model = model_of(pattern)
    free = model_of(ByLayer.Config(patterns=(pattern.patterns[0].replace(span_penalty=0.0), Causal.Config())))
    spans = [layer.span for layer in model.attentions]
    assert [span is None for span in spans] == [False, True]
    ids = tokens(model)
    results = []
    for each in (model, free):
        losses = each(ids[:, :-1], ids[:, 1:]).losses
        losses.total.backward()
        results.append((losses, each.attentions[0].span.raw_H.grad))
    (losses, grad), (free_losses, free_grad) = results
    mean = torch.stack([span.spans().mean() for span in spans if span is not None]).mean()
    torch.testing.assert_close(losses.attention_span, mean.detach())
    torch.testing.assert_close(losses.total - free_losses.total, 0.25 * mean)
    # d/draw of 0.25 x mean over 4 heads of 16 sigmoid(raw)
    slope = torch.sigmoid(spans[0].raw_H) * torch.sigmoid(-spans[0].raw_H)
    torch.testing.assert_close(grad - free_grad, 0.25 * 16 / 4 * slope)
    plain = model_of(SlidingWindow.Config(window=3))
    assert plain(ids[:, :-1], ids[:, 1:]).losses.attention_span == 0


@pytest.mark.parametrize("name", ["by_head", "adaptive_window"])
def test_a_compiled_model_computes_the_same_in_one_graph(name):
    model = model_of(PATTERNS[name][-1], moe=None)
    ids, documents = tokens(model, length=LENGTH), torch.arange(LENGTH).div(11, rounding_mode="floor").expand(2, -1)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids).logits_BTV, model(ids).logits_BTV, atol=1e-12, rtol=0)
    within = compiled(ids, documents=documents).logits_BTV
    torch.testing.assert_close(within, model(ids, documents=documents).logits_BTV, atol=1e-12, rtol=0)


def test_a_compiled_model_finds_the_block_masks_that_forwards_before_have_left():
    model = model_of(SlidingWindow.Config(window=5), attention__backend="flex", moe=None)
    ids = tokens(model, length=LENGTH)
    with torch.no_grad():
        expected = model(ids).logits_BTV
        counts = model.block_masks.counts()
        assert (counts.hits, counts.misses) == (0, 1)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids).logits_BTV, expected, atol=1e-5, rtol=1e-5)
    assert model.block_masks.counts() == counts
