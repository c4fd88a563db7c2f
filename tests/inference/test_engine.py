"""Decoding: the cache changes nothing but the time, batches change nothing, and text streams come whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blues.errors import ConfigError
from blues.inference import engine
from blues.inference.engine import TextDecoder, Usage, generate, prefill, sample_text, stream_text
from tests.inference.models import TINY, TOKENIZER, TableModel, tiny, uniform_model, wrap

PROMPTS = ["def main", "x", "a longer prompt of words", "\n\n", "class A:"]


def naive_greedy(loaded, prompt: str, count: int) -> list[int]:
    """Reads everything again for every token."""
    ids = list(engine.prompt_ids(loaded, prompt))
    new: list[int] = []
    while len(new) < count:
        logits_V = loaded.model(torch.tensor([ids + new])).logits_BTV[0, -1]
        new.append(int(logits_V.masked_fill(~loaded.allowed_V, -torch.inf).argmax()))
        if new[-1] == loaded.tokenizer.eot_id:
            return new[:-1]
    return new


@pytest.mark.parametrize("seed", range(3))
def test_greedy_with_the_cache_is_greedy_without_it(seed):
    loaded = tiny(seed)
    for prompt in PROMPTS:
        with_cache = generate(loaded, [prompt], temperature=0, max_length=16)[0].new_ids
        assert with_cache == naive_greedy(loaded, prompt, 16)


@pytest.mark.parametrize("changes", [{"temperature": 0}, {"temperature": 1.0, "top_p": 0.9, "seed": 4}], ids=str)
@pytest.mark.parametrize("chunk", [512, 3])
def test_a_batch_of_different_lengths_gives_what_each_prompt_gives_alone(changes, chunk, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", chunk)
    loaded = tiny(1)
    together = generate(loaded, PROMPTS, max_length=12, **changes)
    alone = generate(loaded, PROMPTS[:1], max_length=12, **changes)
    assert together[0] == alone[0]  # row 0 draws from the same stream in both
    if changes["temperature"] == 0:
        assert together == [generate(loaded, [prompt], max_length=12, **changes)[0] for prompt in PROMPTS]
    repeated = generate(loaded, PROMPTS, max_length=12, **changes)
    assert repeated == together


@pytest.mark.parametrize("chunk", [1, 2, 5, 512])
def test_prefill_of_padded_rows_gives_each_prompts_own_last_logits(chunk, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", chunk)
    loaded = tiny(2)
    prompts = [[7], [5, 6, 250, 9, 1, 2, 3], [299, 4, 4], [8, 8, 8, 8, 8, 8, 8]]
    cache = loaded.make_cache(len(prompts), 2)
    logits_BV = prefill(loaded.model, prompts, cache)
    assert cache.lengths == [len(prompt) for prompt in prompts]
    for row, prompt in enumerate(prompts):
        expected_V = loaded.model(torch.tensor([prompt])).logits_BTV[0, -1]
        torch.testing.assert_close(logits_BV[row], expected_V, atol=1e-5, rtol=1e-5)


def successor_model(eot_after: int) -> TableModel:
    """Token t is followed by t + 1; the end of the text follows `eot_after`."""
    logits_VV = torch.full((320, 320), -30.0)
    for token in range(320):
        logits_VV[token, 299 if token == eot_after else min(token + 1, 298)] = 30.0
    return TableModel(logits_VV)


def test_rows_stop_one_by_one_and_say_why():
    loaded = wrap(successor_model(eot_after=70))  # ids 65..70 are single bytes, whatever letters they stand for
    texts = [loaded.tokenizer.decode([token]) for token in (68, 70, 10)]
    usage = Usage()
    generations = generate(loaded, texts, max_length=5, temperature=1.0, usage=usage)
    assert [g.new_ids for g in generations] == [[69, 70], [], [11, 12, 13, 14, 15]]
    assert [g.stop for g in generations] == ["eot", "eot", "max_length"]
    assert [g.text for g in generations] == [loaded.tokenizer.decode(g.new_ids) for g in generations]
    assert (usage.prompt_tokens, usage.new_tokens) == (3, 7)
    assert usage.tokens_per_second > 0 and usage.summary().startswith("3 prompt tokens, 7 new tokens, ")


def test_the_context_is_a_wall_not_a_window():
    loaded = tiny(0)
    room = loaded.max_seq_len
    prompt = "q" * (room - 3)  # a token for each letter: this vocabulary has no longer ones of it
    stream = stream_text(wrap(successor_model(999)), prompt, temperature=0, max_length=50)
    "".join(stream)
    assert (len(stream.generation.new_ids), stream.generation.stop) == (3, "context")
    assert "max_seq_len" in stream.summary()
    with pytest.raises(ConfigError, match=rf"the prompt has {room} tokens.*sees {room} at once.*to {room - 1} tokens"):
        sample_text(loaded, "q" * room)


def test_an_empty_prompt_begins_a_document():
    loaded = wrap(successor_model(eot_after=70))
    assert engine.prompt_ids(loaded, "") == [299]
    assert generate(loaded, []) == []


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    loaded = wrap(uniform_model())
    first = sample_text(loaded, "a", seed=1, max_length=40)
    assert first == sample_text(loaded, "a", seed=1, max_length=40)
    assert first != sample_text(loaded, "a", seed=2, max_length=40)


def test_a_uniform_model_never_samples_padding_and_reaches_everything_else():
    loaded = wrap(uniform_model(), TINY.replace(max_seq_len=128))
    seen = set()
    for seed in range(8):
        batch = generate(loaded, ["a"] * 8, seed=seed, temperature=1, top_p=1, max_length=60)
        seen |= {token for generation in batch for token in generation.new_ids}
    assert max(seen) < loaded.tokenizer.n_vocab
    assert len(seen) > 290  # 299 ids that are not the end, about 3,300 draws: each is missed with probability 2e-5


def test_unknown_and_impossible_settings_are_named():
    loaded = wrap(uniform_model())
    with pytest.raises(ConfigError, match="temprature.*temperature"):
        sample_text(loaded, "a", temprature=1)
    with pytest.raises(ConfigError, match="--top-p"):
        sample_text(loaded, "a", top_p=2)


def test_a_stream_is_the_text_in_pieces():
    loaded = wrap(uniform_model())
    stream = stream_text(loaded, "a", seed=3, temperature=1, top_p=1, max_length=40)
    pieces = list(stream)
    assert "".join(pieces) == sample_text(loaded, "a", seed=3, temperature=1, top_p=1, max_length=40)
    assert stream.generation.text == "".join(pieces) and all(pieces)


def test_characters_of_several_tokens_come_whole():
    tokenizer = TOKENIZER.build()
    text = "naïve – 日本語 🎷 blues"
    decoder = TextDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer.encode(text)]
    assert decoder.finish() == "" and "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces) and "🎷" in pieces


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 305), max_size=40))
def test_any_tokens_stream_to_what_they_decode_to(ids):
    tokenizer = TOKENIZER.build()
    decoder = TextDecoder(tokenizer)
    assert "".join(decoder.push(token) for token in ids) + decoder.finish() == tokenizer.decode(ids)


def test_the_number_of_threads_is_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        generate(wrap(uniform_model()), ["a"], max_length=4)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
def test_a_gpu_decodes_what_the_cpu_decodes():
    loaded, config = tiny(1), tiny(1).config
    on_gpu = wrap(config.build(seed=1).cuda(), config)
    for changes in ({"temperature": 0}, {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 2}):
        expected = generate(loaded, PROMPTS, max_length=12, **changes)
        assert generate(on_gpu, PROMPTS, max_length=12, **changes) == expected
    bf16 = wrap(config.build(seed=1).to("cuda", torch.bfloat16), config)
    assert all(g.new_ids for g in generate(bf16, PROMPTS, max_length=12, temperature=0))
