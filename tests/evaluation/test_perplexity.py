"""Scoring: every token but the first counts once, and the numbers are those of one long forward pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blues.evaluation.perplexity import Score, Windows, byte_lengths, score_tokens, score_windows, spread
from tests.inference.models import TOKENIZER, TableModel, tiny, uniform_model

RNG = np.random.default_rng(0)
LENGTHS = byte_lengths(TOKENIZER.build())
OPTIONS = {"byte_lengths_V": LENGTHS}


@settings(max_examples=200, deadline=None)
@given(length=st.integers(0, 300), context=st.integers(1, 64), data=st.data())
def test_windows_score_every_token_but_the_first_once_with_the_most_context(length, context, data):
    stride = data.draw(st.integers(1, context))
    plan = list(Windows(length, context, stride))
    assert len(plan) == len(Windows(length, context, stride))
    scored = [position for window in plan for position in range(window.first_scored, window.stop)]
    assert scored == list(range(1, length))
    for window in plan:
        inputs = window.stop - window.start - 1
        assert inputs == min(context, length - 1), "all windows are full and equally long"
        assert window.start < window.first_scored, "every scored token has something before it"
        if window.start > 0:
            assert window.first_scored - window.start >= context - stride


def test_spread_takes_evenly_spaced_windows_of_about_so_many_tokens():
    plan = Windows(10_001, context=100, stride=50)
    some = list(spread(plan, 1_000))
    starts = [window.start for window in some]
    assert 900 <= sum(window.stop - window.first_scored for window in some) <= 1_100
    assert len({b - a for a, b in zip(starts, starts[1:], strict=False)}) <= 2 and starts[-1] > 8_000
    assert list(spread(plan, 0)) == list(spread(plan, 10_000)) == list(plan)
    assert len(list(spread(plan, 1))) == 1


def long_forward(model, tokens: np.ndarray) -> float:
    """Nats of all tokens but the first, in one pass and straight from the logits."""
    logits_TV = model(torch.from_numpy(tokens)[None]).logits_BTV[0]
    log_probs = logits_TV[:-1].double().log_softmax(-1)
    return -log_probs[torch.arange(len(tokens) - 1), torch.from_numpy(tokens[1:])].sum().item()


@pytest.mark.parametrize(
    ("context", "stride", "batch_size"), [(48, 24, 8), (7, 3, 2), (5, 5, 64), (1, 1, 3), (400, 9, 1)]
)
def test_sliding_equals_one_long_forward_where_context_does_not_matter(context, stride, batch_size):
    """A model that looks at the last token alone scores the same however the text is cut."""
    model = TableModel(torch.randn(320, 320, generator=torch.Generator().manual_seed(1)))
    tokens = RNG.integers(0, 300, 211)
    score = score_tokens(model, tokens, context=context, stride=stride, batch_size=batch_size, **OPTIONS)
    assert score.tokens == 210
    assert score.nats == pytest.approx(long_forward(model, tokens), rel=1e-5)


def test_a_text_within_the_context_is_one_long_forward_of_a_real_model():
    loaded = tiny(3)
    tokens = RNG.integers(0, 300, 48)
    score = score_tokens(loaded.model, tokens, context=48, **OPTIONS)
    assert score.nats == pytest.approx(long_forward(loaded.model, tokens), rel=1e-5)


def test_sliding_windows_score_each_token_from_the_window_that_is_its_own():
    loaded, tokens, context, stride = tiny(3), RNG.integers(0, 300, 130), 24, 10
    expected = 0.0
    for window in Windows(len(tokens), context, stride):
        logits_TV = loaded.model(torch.from_numpy(tokens[window.start : window.stop - 1])[None]).logits_BTV[0]
        for position in range(window.first_scored, window.stop):
            log_probs_V = logits_TV[position - window.start - 1].double().log_softmax(-1)
            expected -= log_probs_V[tokens[position]].item()
    score = score_tokens(loaded.model, tokens, context=context, stride=stride, batch_size=4, **OPTIONS)
    assert score.nats == pytest.approx(expected, rel=1e-5)


def test_the_routing_of_every_scored_token_is_seen_once():
    loaded, seen = tiny(0), []

    def observe(routing, scored):
        assert len(routing) == 1  # one of the two layers is a mixture
        seen.append(routing[0].ids_TK[scored])

    tokens = RNG.integers(0, 300, 200)
    score_tokens(loaded.model, tokens, context=32, stride=8, observe=observe, **OPTIONS)
    assert torch.cat(seen).shape == (199, 2)


def test_a_uniform_model_has_known_figures():
    tokenizer = TOKENIZER.build()
    text = "Blues, naïvely 日本 played.\n" * 20
    tokens = tokenizer.encode(text)
    score = score_tokens(uniform_model(), tokens, context=16, **OPTIONS)
    scored_bytes = len(tokenizer.decode_bytes(tokens[1:]))
    assert score.bytes == scored_bytes
    assert score.cross_entropy == pytest.approx(math.log(320), rel=1e-6)
    assert score.perplexity == pytest.approx(320, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(math.log2(320) * (len(tokens) - 1) / scored_bytes, rel=1e-6)


def test_the_end_of_text_counts_as_a_token_of_no_bytes():
    eot = TOKENIZER.build().eot_id
    score = score_tokens(uniform_model(), [5, eot, 6], context=16, **OPTIONS)
    assert (score.tokens, score.bytes) == (2, 1)


def test_scores_add_up():
    first, second = Score(3, 6.0, 10), Score(1, 1.0, 2)
    both = first + second
    assert (both.tokens, both.nats, both.bytes) == (4, 7.0, 12)
    assert both.cross_entropy == 1.75 and both.perplexity == pytest.approx(math.exp(1.75))
    assert math.isnan(Score().cross_entropy) and math.isnan(Score().perplexity) and math.isnan(Score().bits_per_byte)
    assert Score(1, 5000.0, 1).perplexity == math.inf


def test_nothing_to_score_is_an_empty_score():
    for tokens in ([], [4]):
        assert score_tokens(uniform_model(), tokens, context=8, **OPTIONS) == Score()
    assert score_windows(uniform_model(), lambda start, stop: np.zeros(stop - start), [], **OPTIONS) == Score()
