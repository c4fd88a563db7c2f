"""The tokenizer is tiktoken's o200k_base; truncations lose no byte; text is text; a damaged vocabulary is refused; a
fast backend never lets anything out that tiktoken would not."""

from __future__ import annotations

import argparse
import functools
import inspect
import logging
import pickle
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blues import config as cfg
from blues.data import fast_tokenizers, parity
from blues.data import tokenizer as tok
from blues.data.tokenizer import Tokenizer
from blues.errors import ConfigError, DataError

TIKTOKEN_NAME = "fb374d419588a4632f3f557e76b4b70aebbca790"
SIZES = (257, 300, 4096, 50_000, None)
LAW = settings(max_examples=60, deadline=None)

texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=80),
    st.text("aAé '\n\r\t中1.<|>\u0301\u2028", max_size=80),
)


@functools.cache
def build(vocab_size: int | None) -> Tokenizer:
    return Tokenizer.Config(vocab_size=vocab_size).build()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tiktoken.Encoding:
    """tiktoken's own o200k_base, from a cache that holds our file; tiktoken checks its hash as well."""
    cache = tmp_path_factory.mktemp("tiktoken")
    shutil.copy(tok.VOCABULARY_FILE, cache / TIKTOKEN_NAME)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        return tiktoken.get_encoding("o200k_base")


def test_vocabulary_pattern_and_special_tokens_are_those_of_tiktoken(theirs):
    ours = build(None)
    assert ours.encoding._mergeable_ranks == theirs._mergeable_ranks
    assert ours.encoding._pat_str == theirs._pat_str
    assert ours.encoding._special_tokens == theirs._special_tokens
    assert (ours.n_vocab, ours.eot_id) == (theirs.n_vocab, theirs.eot_token) == (tok.WHOLE_VOCABULARY, 199_999)


@LAW
@given(texts)
@example("<|endoftext|>")
@example(" \n \n\n  x")
@example("I'LL we'Re ÇA ǅ")
def test_it_equals_tiktoken_on_any_text(theirs, text):
    assert build(None).encode(text) == theirs.encode_ordinary(text)


def test_it_equals_tiktoken_on_source_code_and_prose(theirs):
    for module in (inspect, argparse):
        text = Path(module.__file__).read_text(encoding="utf-8")
        assert build(None).encode(text) == theirs.encode_ordinary(text)


@pytest.mark.parametrize("size", SIZES)
@LAW
@given(text=texts)
@example(text="")
@example(text="<|endoftext|><|endofprompt|>")
def test_decoding_undoes_encoding_and_ids_stay_inside_the_vocabulary(size, text):
    tokenizer = build(size)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()
    assert all(0 <= id < tokenizer.n_vocab for id in ids)
    assert tokenizer.eot_id not in ids
    array = tokenizer.encode_array(text)
    assert array.dtype == np.uint32 and array.tolist() == ids


@pytest.mark.parametrize("size", SIZES)
def test_every_byte_has_an_id_of_its_own(size):
    ids = [build(size).encoding.encode_single_token(bytes([byte])) for byte in range(256)]
    assert len(set(ids)) == 256 and max(ids) < build(size).n_vocab - 1
    assert build(size).decode_bytes(ids) == bytes(range(256))


@pytest.mark.parametrize("size", [257, 300, 4096, tok.NUM_RANKS + 1])
def test_a_truncation_holds_the_first_ranks_and_ends_with_end_of_text(size):
    tokenizer = build(size)
    assert (tokenizer.n_vocab, tokenizer.eot_id) == (size, size - 1)
    assert tokenizer.decode([size - 1]) == tok.END_OF_TEXT
    whole = build(None)
    for id in (0, 255, size - 2):
        assert tokenizer.decode_bytes([id]) == whole.decode_bytes([id])


def test_truncation_merges_exactly_the_kept_ranks():
    """A naive byte pair encoding over the first ranks gives the same ids, word by word."""

    def naive(word: bytes, ranks: dict[bytes, int]) -> list[int]:
        parts = [bytes([byte]) for byte in word]
        while len(parts) > 1:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 1 << 30))
            if parts[best] + parts[best + 1] not in ranks:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return [ranks[part] for part in parts]

    for size in (300, 4096):
        ranks = {token: rank for token, rank in tok.load_ranks().items() if rank < size - 1}
        for word in (" internationalization", "Überraschung", "????", " return", "中文字"):
            assert build(size).encode(word) == naive(word.encode(), ranks)


def test_special_tokens_in_text_are_plain_text():
    for size in SIZES:
        ids = build(size).encode("a<|endoftext|>b")
        assert build(size).eot_id not in ids and build(size).decode(ids) == "a<|endoftext|>b"
    assert build(None).decode([build(None).eot_id]) == "<|endoftext|>"


@LAW
@given(ids=st.lists(st.integers(-(1 << 40), 1 << 40) | st.integers(199_990, 200_070), max_size=8))
def test_decoding_never_fails_and_marks_ids_that_do_not_exist(ids):
    for size in (300, None):
        tokenizer = build(size)
        kept = [id for id in ids if 0 <= id < tokenizer.n_vocab]
        pieces = [tokenizer.decode_bytes([id]) if id in kept else b"\xef\xbf\xbd" for id in ids]
        assert tokenizer.decode_bytes(ids) == b"".join(pieces)
        assert tokenizer.decode(ids) == b"".join(pieces).decode("utf-8", "replace")


def test_unused_and_padding_ids_decode_to_the_replacement_character():
    assert build(None).decode([199_998, 200_050]) == "\ufffd\ufffd"
    assert build(300).decode([300, 65]) == "\ufffd" + build(300).decode([65])


def test_lone_surrogates_become_the_replacement_character():
    assert build(None).decode(build(None).encode("a\ud800b")) == "a\ufffdb"


def test_runs_that_break_the_regular_expression_engine_are_encoded():
    tokenizer = build(4096)
    for text in (" " * 2_500_000, "x" + "\n" * 1_200_000 + "y", " " * (tok.LONGEST_BLANK_RUN + 1) + "z"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_equal_configurations_share_an_encoding_also_after_pickling():
    first, second = Tokenizer.Config(vocab_size=300).build(), Tokenizer.Config(vocab_size=300).build()
    assert first.encoding is second.encoding
    packed = pickle.dumps(first)
    assert len(packed) < 1000, "the vocabulary does not travel"
    assert pickle.loads(packed).encoding is first.encoding


def test_the_ranks_count_up_without_gaps():
    """So that the parser need not read them; the file is the one whose hash is known."""
    ranks = [int(line.split()[1]) for line in tok.VOCABULARY_FILE.read_bytes().splitlines()]
    assert ranks == list(range(tok.NUM_RANKS))
    whole = tok.load_ranks()
    assert list(whole.values()) == ranks
    for count in (256, 4095, tok.NUM_RANKS):
        assert list(tok.load_ranks(count).items()) == list(whole.items())[:count]


def test_the_fingerprint_changes_with_the_vocabulary_and_needs_no_vocabulary(monkeypatch):
    fingerprints = {size: build(size).fingerprint for size in SIZES}
    assert len(set(fingerprints.values())) == len(SIZES)
    monkeypatch.setattr(tok, "load_ranks", pytest.fail)
    assert all(tok.fingerprint(Tokenizer.Config(vocab_size=size)) == fingerprints[size] for size in SIZES)
    for name, value in (("VOCABULARY_SHA256", "0" * 64), ("PATTERN", r"\w+")):
        with monkeypatch.context() as patch:
            patch.setattr(tok, name, value)
            assert tok.fingerprint(Tokenizer.Config(vocab_size=300)) != fingerprints[300]


def damage(content: bytes) -> bytes:
    return content.replace(b" 1000\n", b" 1001\n", 1)


@pytest.mark.parametrize(("change", "words"), [(damage, "is damaged"), (lambda content: content[:-9], "is damaged")])
def test_a_corrupted_vocabulary_file_is_refused(tmp_path, monkeypatch, change, words):
    file = tmp_path / "o200k_base.tiktoken"
    content = tok.VOCABULARY_FILE.read_bytes()
    file.write_bytes(change(content))
    assert file.read_bytes() != content
    monkeypatch.setattr(tok, "VOCABULARY_FILE", file)
    with pytest.raises(DataError, match=words) as caught:
        tok.load_ranks()
    assert str(file) in str(caught.value) and "install blues again" in str(caught.value)


def test_a_missing_vocabulary_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tok, "VOCABULARY_FILE", tmp_path / "gone.tiktoken")
    with pytest.raises(DataError, match=r"gone\.tiktoken.*No such file.*install blues again"):
        tok.load_ranks()


@pytest.mark.parametrize("size", [0, -1, 256, tok.NUM_RANKS + 2])
def test_an_impossible_vocabulary_size_is_refused(size):
    with pytest.raises(ConfigError, match=rf"vocab_size: {size} is outside 257 ... 199999"):
        Tokenizer.Config(vocab_size=size)


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="o200k_base"):
        cfg.load(Tokenizer.Config, {"name": "cl100k_base"})


BACKENDS = ("tiktoken", "fast", "fastokens", "quicktok")
nasty = st.one_of(
    texts,
    st.text(max_size=40),  # lone surrogates too
    st.lists(st.sampled_from([*parity.BLANKS, *parity.WORDS, *parity.SIGNS, "\ud83d", "\ude00", "'ſ"])).map("".join),
    st.tuples(st.text(min_size=1, max_size=2), st.integers(1, 3000)).map(lambda pair: pair[0] * pair[1]),
)


@functools.cache
def build_backend(backend: str, vocab_size: int | None = None) -> Tokenizer:
    return Tokenizer.Config(vocab_size=vocab_size).build(backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [300, None])
@LAW
@given(batch=st.lists(nasty, max_size=5))
@example(batch=[" " * 1_000_001 + "x", "a\ud800b", "\ud83d\ude00", "e'ſ'res", "<|endoftext|>", ""])
@example(batch=["a" * 100_000, "\r\n" * 50_000, "1" * 100_000, "👩\u200d👩\u200d👧" * 1000, "e\u0301\u0323" * 1000])
def test_a_batch_equals_one_by_one_on_every_backend(backend, size, batch):
    tokenizer = build_backend(backend, size)
    arrays = tokenizer.encode_arrays(batch)
    assert all(array.dtype == np.uint32 for array in arrays)
    assert [array.tolist() for array in arrays] == [tokenizer.encode_array(text).tolist() for text in batch]
    assert tokenizer.backend == ("fastokens" if backend == "fast" else backend) and tokenizer.fell_back is None


def test_threads_change_no_token_and_no_order():
    texts = [f"text {number} {'word ' * (number % 50)}" for number in range(300)] + ["a\ud800b", " " * 1_000_001, ""]
    tokenizer = pickle.loads(pickle.dumps(Tokenizer.Config(vocab_size=4096).build(threads=3)))
    expected = build(4096).encode_arrays(texts)
    assert [array.tolist() for array in tokenizer.encode_arrays(texts)] == [array.tolist() for array in expected]
    assert tokenizer.encode_arrays([]) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tokenizer_travels_as_its_configuration_and_backend(backend):
    tokenizer = build_backend(backend, 300)
    packed = pickle.dumps(tokenizer)
    assert len(packed) < 1000, "no vocabulary travels"
    again = pickle.loads(packed)
    assert (again.config, again.backend, again.fell_back) == (tokenizer.config, tokenizer.backend, None)
    assert again.fingerprint == build(300).fingerprint, "the backend is no part of the identity"


class Liar(fast_tokenizers.FastTokenizer):
    """tiktoken behind the interface of the fast ones, honest in the self-test; `spoil` is what it does afterwards."""

    name = "liar"
    requirement = "liar>=1"
    one_in = 1
    unlike = fast_tokenizers.LONG_S
    spoil: Callable[[str, np.ndarray], np.ndarray] = staticmethod(lambda text, tokens: tokens)

    def __init__(self, ranks: dict[bytes, int], pattern: str) -> None:
        self.encoding = tiktoken.Encoding("liar", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = [np.array(self.encoding.encode_ordinary(text), dtype=np.uint32) for text in texts]
        rows = [self.spoil(text, row) for text, row in zip(texts, rows, strict=True)]
        return np.concatenate([np.empty(0, np.uint32), *rows]), np.cumsum([0, *map(len, rows)])


@pytest.fixture
def liar(monkeypatch) -> type[Liar]:
    """A fresh `Liar`, the only fast backend."""
    monkeypatch.setattr(fast_tokenizers, "BACKENDS", {"liar": (kind := type("Fresh", (Liar,), {}))})
    monkeypatch.setattr(tok, "_open_backend", tok._open_backend.__wrapped__)
    return kind


class PanicException(BaseException):
    """What a panic of Rust is in Python: no `Exception`."""


def panic(text: str, tokens: np.ndarray) -> np.ndarray:
    raise PanicException("called `Option::unwrap()` on a `None` value")


def lie(text: str, tokens: np.ndarray) -> np.ndarray:
    return tokens[::-1]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(lie, "liar gives .* where tiktoken gives .* at '.*number 30"), (panic, "liar failed .*PanicException: called")],
)
def test_a_backend_that_lies_or_breaks_in_mid_corpus_is_replaced_before_anything_wrong_leaves(
    liar, monkeypatch, caplog, spoil, words
):
    tokenizer = Tokenizer.Config(vocab_size=300).build(backend="fast")
    batches = [[f"the text with the number {number} – 中" for number in range(start, start + 10)] for start in (0, 10)]
    bad = [*batches[0], "the text with the number 30", *batches[1]]
    expected = [build(300).encode(text) for text in bad]
    monkeypatch.setattr(
        liar, "spoil", staticmethod(lambda text, tokens: spoil(text, tokens) if "number 30" in text else tokens)
    )
    for batch in batches:
        tokenizer.encode_arrays(batch)
    assert (tokenizer.backend, tokenizer.rechecked, tokenizer.fell_back) == ("liar", 20, None)
    with caplog.at_level(logging.WARNING, "blues"):
        assert [array.tolist() for array in tokenizer.encode_arrays(bad)] == expected
    assert (tokenizer.backend, tokenizer.rechecked) == ("tiktoken", 20)
    assert tokenizer.fell_back in caplog.text and "20 documents of earlier batches" in caplog.text
    assert "liar" in tokenizer.fell_back and re.search(words, tokenizer.fell_back)
    monkeypatch.setattr(liar, "encode", pytest.fail)
    assert [array.tolist() for array in tokenizer.encode_arrays(bad)] == expected
    assert pickle.loads(pickle.dumps(tokenizer)).backend == "tiktoken", "given up for good"


def test_a_person_can_interrupt_a_fast_backend(liar, monkeypatch):
    tokenizer = Tokenizer.Config(vocab_size=300).build(backend="liar")

    def interrupt(text: str, tokens: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(liar, "spoil", staticmethod(interrupt))
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode_arrays(["a"])
    assert tokenizer.backend == "liar"


def test_fast_takes_the_next_backend_that_agrees_and_says_what_was_wrong_with_the_first(liar, monkeypatch, caplog):
    backends = {"liar": liar, "quicktok": fast_tokenizers.Quicktok}
    monkeypatch.setattr(fast_tokenizers, "BACKENDS", backends)
    monkeypatch.setattr(liar, "spoil", staticmethod(lie))
    with caplog.at_level(logging.WARNING, "blues"):
        tokenizer = Tokenizer.Config(vocab_size=300).build(backend="fast")
    assert (tokenizer.backend, tokenizer.fell_back) == ("quicktok", None)
    (message,) = caplog.messages
    assert message.startswith("tokenizer backend 'liar' failed its self-test: liar gives [")


def test_without_any_fast_backend_tiktoken_does_the_work_and_says_so(liar, monkeypatch, caplog):
    def missing(self: Liar, ranks: dict[bytes, int], pattern: str) -> None:
        raise ModuleNotFoundError("No module named 'liar'")

    monkeypatch.setattr(liar, "__init__", missing)
    with caplog.at_level(logging.WARNING, "blues"):
        tokenizer = Tokenizer.Config(vocab_size=300).build(backend="fast")
    assert tokenizer.backend == "tiktoken" and "pip install 'liar>=1'" in tokenizer.fell_back
    assert len(caplog.messages) == 2 and "tiktoken does the work" in caplog.messages[1]
    assert tokenizer.encode_arrays(["a b"])[0].tolist() == build(300).encode("a b")
    with pytest.raises(ConfigError, match=r"'liar' is not installed .*pip install 'liar>=1'"):
        Tokenizer.Config(vocab_size=300).build(backend="liar")


def test_a_backend_asked_for_by_name_that_disagrees_is_refused(liar, monkeypatch):
    monkeypatch.setattr(liar, "spoil", staticmethod(lie))
    with pytest.raises(DataError, match="'liar' failed its self-test"):
        Tokenizer.Config(vocab_size=300).build(backend="liar")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ConfigError, match=r"unknown tokenizer backend 'fastoken'. Did you mean 'fastokens'\?"):
        Tokenizer.Config(vocab_size=300).build(backend="fastoken")
