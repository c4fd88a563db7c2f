import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blues.data.tokenizer import Tokenizer
from blues.model.huggingface_tokenizer import byte_letters, merges_of, split_below, tokenizer_files


def both(vocab_size):
    import tokenizers

    ours = Tokenizer(Tokenizer.Config(vocab_size=vocab_size))
    files = tokenizer_files(ours, max_length=64)
    return ours, tokenizers.Tokenizer.from_str(json.dumps(files["tokenizer.json"]))


@pytest.fixture(scope="module", params=[257, 4096, None], ids=["bytes", "4096", "whole"])
def pair(request):
    return both(request.param)


def assert_same(pair, text):
    """Except for the spelled special tokens, which Blues reads as plain text."""
    ours, theirs = pair
    text = text.replace("<|endof", "<|end of")
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False).ids == ids
    assert theirs.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_ids_of_any_text_are_equal(pair, text):
    assert_same(pair, text)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from(" \n\t\r'sSLl_.,(){}é你🙂012aZ"), max_size=80))
def test_ids_of_awkward_blanks_and_contractions_are_equal(pair, text):
    assert_same(pair, text)


def test_ids_of_source_code_are_equal(pair):
    for path in (Path(__file__), Path(json.__file__), Path(json.decoder.__file__)):
        assert_same(pair, path.read_text(encoding="utf-8"))


def test_special_tokens_keep_their_ids(pair):
    """In the whole vocabulary these lie beyond a gap of unused ids."""
    ours, theirs = pair
    for text, token in ours.encoding._special_tokens.items():
        assert theirs.token_to_id(text) == token
        assert theirs.encode(f"a{text}b").ids == [*ours.encode("a"), token, *ours.encode("b")]
    assert theirs.decode([ours.eot_id], skip_special_tokens=True) == ""


def test_merges_are_the_pairs_that_make_each_token():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"cd": 257, b"abcd": 258, b"abc": 259}
    # abc first meets (a, b), then ab + c; nothing of rank below 258 joins ab and cd before abcd itself.
    assert merges_of(ranks) == [(b"a", b"b"), (b"c", b"d"), (b"ab", b"cd"), (b"ab", b"c")]
    assert split_below(ranks, b"abcdab", 258) == [b"ab", b"cd", b"ab"]


def test_a_token_that_merging_never_makes_has_no_pair():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"xyz": 256}
    assert merges_of(ranks) == []


def test_every_byte_has_its_own_printable_letter():
    letters = byte_letters()
    assert len(set(letters)) == 256 and all(letter.isprintable() for letter in letters)
    assert letters[ord("a")] == "a" and letters[ord(" ")] == "Ġ" and letters[ord("\n")] == "Ċ"
