"""A fast tokenizer is believed while it agrees with tiktoken: the self-test, the sample, what a disagreement says."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from blues.data import parity
from blues.data.fast_tokenizers import LONG_S, FastTokenizer
from blues.data.parity import UNICODE_17, Disagreement, Rechecked
from blues.data.tokenizer import PATTERN, load_encoding, load_ranks

ENCODING = load_encoding(4096)


def oracle(text: str) -> np.ndarray:
    return ENCODING.encode_to_numpy(text, disallowed_special=())


class Fake(FastTokenizer):
    """tiktoken behind the interface of the fast ones; `change` may spoil the tokens of a text."""

    name = "fake"
    requirement = "fake>=1"
    one_in = 4
    unlike = LONG_S

    def __init__(self, change: Callable[[str, np.ndarray], np.ndarray] = lambda text, tokens: tokens) -> None:
        self.change = change
        self.seen: list[str] = []

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        self.seen += texts
        rows = [self.change(text, oracle(text)) for text in texts]
        return np.concatenate([np.empty(0, np.uint32), *rows]), np.cumsum([0, *map(len, rows)])


def documents(number: int) -> list[str]:
    return [f"document {n}: {'x' * (n % 50)} {n * n} ends\n" for n in range(number)]


def test_what_equals_tiktoken_passes_the_self_test_which_is_quick_and_always_the_same():
    fake = Fake()
    began = time.perf_counter()
    parity.self_test(fake, ENCODING)
    assert time.perf_counter() - began < 3, "0.2 s on an idle machine, for tiktoken alone does most of it"
    texts = [text for text in parity.nasty_texts(ENCODING) if LONG_S not in text]
    assert fake.seen == texts * 2, "words unseen, words seen"


def test_the_self_test_covers_what_tokenizers_get_wrong():
    texts = parity.nasty_texts(ENCODING)
    whole = "".join(texts)
    assert set(range(0x3400)) <= set(map(ord, whole))
    assert all(any(first <= ord(letter) <= last for letter in set(whole)) for first, last in UNICODE_17)
    for piece in (
        "<|endoftext|>",
        "e'LL",
        "\r\n\r\n",
        "👩\u200d👩\u200d👧",
        "a" * 3000,
        " " * 99 + "x",
        "e\u0301\u0323",
        "\0",
    ):
        assert piece in whole, piece
    assert max(map(len, texts)) > 100_000 and "" in texts
    assert 1_000_000 < len(whole.encode()) < 4_000_000


def drop_contractions(text: str, tokens: np.ndarray) -> np.ndarray:
    return oracle(text.replace("'ve", "' ve"))


def shift_ids(text: str, tokens: np.ndarray) -> np.ndarray:
    return tokens + np.uint32(len(text) == 127)


@pytest.mark.parametrize("change", [drop_contractions, shift_ids, lambda text, tokens: tokens[:-1]])
def test_a_wrong_token_anywhere_fails_the_self_test(change):
    with pytest.raises(Disagreement, match=r"fake gives \[.*\] where tiktoken gives \[.*\], byte \d+ of a text of"):
        parity.self_test(Fake(change), ENCODING)


def test_a_border_between_documents_out_of_place_fails_the_self_test():
    class Shifting(Fake):
        def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
            tokens, ends = super().encode(texts)
            ends[len(texts) // 2] += 1
            return tokens, ends

    with pytest.raises(Disagreement, match="where tiktoken gives"):
        parity.self_test(Shifting(), ENCODING)


def test_words_that_come_out_wrong_the_second_time_fail_the_self_test():
    seen: set[str] = set()

    def spoil_known(text: str, tokens: np.ndarray) -> np.ndarray:
        again = text in seen and "snake_case" in text
        seen.add(text)
        return tokens[::-1] if again and len(text) > 200 else tokens

    with pytest.raises(Disagreement, match="snake_case|text of 300 characters"):
        parity.self_test(Fake(spoil_known), ENCODING)


class PanicException(BaseException):
    """What a panic of Rust is in Python: no `Exception`."""


@pytest.mark.parametrize("error", [PanicException("index out of bounds"), RuntimeError("no\nmemory"), ValueError("x")])
def test_whatever_a_backend_raises_is_a_disagreement(error):
    def fail(text: str, tokens: np.ndarray) -> np.ndarray:
        raise error

    with pytest.raises(Disagreement, match=rf"fake failed \({type(error).__name__}: ") as caught:
        parity.self_test(Fake(fail), ENCODING)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_person_can_still_interrupt(error):
    def fail(text: str, tokens: np.ndarray) -> np.ndarray:
        raise error

    with pytest.raises(error):
        parity.self_test(Fake(fail), ENCODING)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tokens, ends: (tokens.astype(np.int64), ends),
        lambda tokens, ends: (tokens, ends[:-1]),
        lambda tokens, ends: (tokens[:-1], ends),
        lambda tokens, ends: (tokens, ends + 1),
    ],
)
def test_an_answer_of_another_shape_is_a_disagreement(spoil):
    class Misshapen(Fake):
        def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
            return spoil(*super().encode(texts))

    with pytest.raises(Disagreement, match="tokens of .* rows for 3 texts"):
        parity.encode_flat(Misshapen(), documents(3))


def test_the_sample_depends_on_the_documents_alone():
    texts = documents(4000)
    chosen = [texts[number] for number in parity.chosen(texts, 4)]
    assert 900 < len(chosen) < 1100
    backwards = texts[::-1]
    assert [backwards[number] for number in parity.chosen(backwards, 4)] == chosen[::-1]
    pieces = [text for start in range(0, 4000, 7) for text in _chosen_of(texts[start : start + 7])]
    assert pieces == chosen
    assert len(set(parity.chosen(texts, 1).values())) == len(texts), "no two alike"
    assert list(parity.chosen(["\ud800", ""], 1)) == [0, 1]


def _chosen_of(texts: list[str]) -> list[str]:
    return [texts[number] for number in parity.chosen(texts, 4)]


def test_documents_are_rechecked_once_and_come_out_as_tiktoken_has_them():
    rechecked = Rechecked(Fake(), oracle, ENCODING)
    texts = documents(200)
    expected = len(parity.chosen(texts, 4))
    for _ in range(3):
        arrays = rechecked.encode(texts)
        assert [array.tolist() for array in arrays] == [oracle(text).tolist() for text in texts]
    assert rechecked.rechecked == expected > 20
    assert rechecked.encode([]) == []


def test_a_lie_about_a_sampled_document_is_found_and_shown():
    liar = Fake(lambda text, tokens: tokens[::-1] if "document 1" in text else tokens)
    with pytest.raises(Disagreement, match=r"byte 0 of a text of .* at 'document 1"):
        Rechecked(liar, oracle, ENCODING).encode(documents(200))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda right: [5, *right[1:]], r"gives \[5, .*\] where tiktoken gives \[\d+, .*\], byte 0 of .*, at 'some "),
        (lambda right: [], r"gives \[\] where tiktoken gives \[\d+, .*\], byte 0 of "),
        (lambda right: [*right, 7], r"gives \[7\] where tiktoken gives \[\], byte 35 of a text of 31 characters, at"),
    ],
)
def test_the_place_of_a_difference_is_shown(spoil, words):
    text = "some words before — and 中 after"
    wanted = oracle(text)
    clause = parity.difference("fake", text, wanted, np.array(spoil(wanted), dtype=np.uint32), ENCODING)
    assert re.match("fake " + words, clause), clause


def test_the_ranks_have_no_gaps_and_the_pattern_is_the_one_quicktok_knows():
    assert list(load_ranks(4095).values()) == list(range(4095)) and ENCODING._pat_str == PATTERN
