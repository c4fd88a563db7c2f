"""Does a fast tokenizer give tiktoken's tokens? A self-test before the first document, re-checks among the documents.

In: a fast encoder, tiktoken. Out: tokens that may be believed, or a `Disagreement` that shows the text.

The self-test (0.2 s) takes what tokenizers have got wrong: every kind of blank and of line end, contractions, digits,
every script and symbol of Unicode, tokens from all over the vocabulary, special tokens written as text, long runs, long
documents, documents with a common beginning, and all of it twice, for the tables of words already seen. It cannot prove
anything about other texts. So one document in some hundreds, chosen by a hash of its content, is encoded by tiktoken as
well; documents that are equal to one that was checked are not checked again.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import tiktoken
import xxhash

if TYPE_CHECKING:
    from blues.data.fast_tokenizers import FastTokenizer

WINDOW = 64
"""Characters from the middle of a document whose hash (with the document's length) says whether it is re-checked."""
EXCERPT = 32
"""Bytes of the text shown on each side of the first wrong token."""

BLANKS = (
    " ", "  ", "   ", "\t", "\t\t", "\n", "\n\n", "\r\n", "\r", "\r\n\r\n", " \n", "\n ", "\t\n\t", "\v", "\f", "\x1c",
    "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u2029", "\u202f", "\u3000", "\ufeff", "\u200b",
)  # fmt: skip
WORDS = (
    "def", "return", "self", "the", "Straße", "naïve", "HTTPServer", "snake_case", "x", "I", "ÇA", "ǅ", "ﬁ", "Привет",
    "мир", "Ελληνικά", "עברית", "العربية", "हिन्दी", "ไทย", "한국어", "中文字", "日本語テキスト", "ქართული", "ʰ", "ª",
    "ₐ", "e\u0301", "e\u0301\u0323", "\u0301", "\u20dd", "\u0e33", "\u1100\u1161\u11a8", "K", "İ", "ı",
)  # fmt: skip
SIGNS = (
    "'s", "'S", "'t", "'T", "'re", "'RE", "'rE", "'ve", "'VE", "'m", "'M", "'ll", "'LL", "'lL", "'d", "'D", "’s", "''",
    "'", '"', "0", "1", "12", "123", "1234", "3.14", "0x1F", "½", "²", "Ⅻ", "٣", "१२३", "(", ")", "();", "[]", "{}",
    "==", "!=", "->", "//", "/", "/\n", "+=", "...", "—", "«", "€", "#", "@", "\\n", "\0", "\x7f", "\ufffd", "🙂",
    "👩\u200d👩\u200d👧", "👍🏽", "🇩🇪", "1\ufe0f\u20e3", "\u200d", "\ufe0f", "\U000e0061", "\ue000", "\U0010ffff",
    "<|endoftext|>", "<|endofprompt|>", "<|", "|>",
)  # fmt: skip
UNICODE_17 = (
    (0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0x1ACF, 0x1ADD), (0x1AE0, 0x1AEB), (0xA7CE, 0xA7CF),
    (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7), (0x10EFA, 0x10EFB),
    (0x11B60, 0x11B67), (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9), (0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3),
    (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DF2), (0x1E6C0, 0x1E6DE),
    (0x1E6E0, 0x1E6F5), (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x323B0, 0x33479),
)  # fmt: skip
"""Letters, marks and digits (first and last code point) that Unicode 17 added; tiktoken's tables are of Unicode 16."""
RUNS = ("a", "A", " ", "\n", "\t", "0", "=", "é", "中", "🙂", "\u0301", "\0", "\r\n", " \n")
SWEPT = (
    range(0x3400), range(0xA000, 0xAC00), range(0xD7A0, 0xD800), range(0xF900, 0x10000),
    range(0x3400, 0xA000, 37), range(0xAC00, 0xD7A0, 37), range(0xE000, 0xF900, 97),
    range(0x10000, 0x1FC00, 5), range(0x1FC00, 0x110000, 1499), *(range(a, b + 1, 61) for a, b in UNICODE_17),
)  # fmt: skip
"""The code points of the self-test: scripts and symbols densely, ideographs, private and unassigned ones sparsely."""


class Disagreement(Exception):
    """A fast tokenizer failed, or its tokens are not tiktoken's; the message shows the text."""


def is_crash(error: BaseException) -> bool:
    """Whether `error` is a failure of the code: a panic of Rust is no `Exception`, and Ctrl-C is no failure."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def describe(error: BaseException) -> str:
    """`error` in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def self_test(fast: FastTokenizer, encoding: tiktoken.Encoding) -> None:
    """Compare `fast` with `encoding` over `nasty_texts`.

    Raises:
        Disagreement: at the first text for which `fast` fails or gives other tokens.
    """

    def oracle(text: str) -> np.ndarray:
        return encoding.encode_to_numpy(text, disallowed_special=())

    texts = [text for text in nasty_texts(encoding) if fast.unlike not in text]
    wanted = [oracle(text) for text in texts]
    wanted_flat, wanted_ends = np.concatenate(wanted), np.cumsum([0, *map(len, wanted)])
    for _ in ("words unseen", "words seen"):
        tokens, ends = encode_flat(fast, texts)
        if np.array_equal(tokens, wanted_flat) and np.array_equal(ends, wanted_ends):
            continue
        for text, want, (start, stop) in zip(texts, wanted, itertools.pairwise(ends.tolist()), strict=True):
            if not np.array_equal(tokens[start:stop], want):
                raise Disagreement(difference(fast.name, text, want, tokens[start:stop], encoding))


class Rechecked:
    """A fast tokenizer of whose documents a sample is encoded by tiktoken as well.

    `oracle` gives the right tokens of any text; `rechecked` counts the documents that were compared.
    """

    def __init__(self, fast: FastTokenizer, oracle: Callable[[str], np.ndarray], encoding: tiktoken.Encoding) -> None:
        self.fast, self.oracle, self.encoding = fast, oracle, encoding
        self.rechecked = 0
        self._known: set[int] = set()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """uint32[num_tokens] of each text; views of one array. Texts without lone surrogates only.

        Raises:
            Disagreement: the backend failed or a re-check found other tokens; nothing of this batch is to be used.
        """
        tokens, ends = encode_flat(self.fast, texts)
        arrays = [tokens[start:stop] for start, stop in itertools.pairwise(ends.tolist())]
        for number, digest in chosen(texts, self.fast.one_in).items():
            if digest not in self._known:
                wanted = self.oracle(texts[number])
                if not np.array_equal(arrays[number], wanted):
                    raise Disagreement(difference(self.fast.name, texts[number], wanted, arrays[number], self.encoding))
                self._known.add(digest)
                self.rechecked += 1
        return arrays


def chosen(texts: Sequence[str], one_in: int) -> dict[int, int]:
    """The numbers of the texts to re-check, and the digest each is chosen by: a multiple of `one_in`.

    A digest is 64 bits of the middle of a text and its length, at the same price for a text of any length. It depends
    on the text alone, so the same documents are chosen in any order and grouping, and by any backend.
    """
    found, mask = {}, one_in - 1
    for number, text in enumerate(texts):
        middle = len(text) >> 1
        window = text[middle : middle + WINDOW].encode("utf-8", "surrogatepass")
        digest = xxhash.xxh3_64_intdigest(window, len(text))
        if not digest & mask:
            found[number] = digest
    return found


def encode_flat(fast: FastTokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """`fast.encode(texts)`; whatever goes wrong in it is a `Disagreement`."""
    try:
        tokens, ends = fast.encode(texts)
        if tokens.dtype != np.uint32 or len(ends) != len(texts) + 1 or ends[0] != 0 or ends[-1] != len(tokens):
            raise ValueError(f"{len(tokens)} tokens of {tokens.dtype} in {len(ends) - 1} rows for {len(texts)} texts")
    except BaseException as error:
        if not is_crash(error):
            raise
        raise Disagreement(f"{fast.name} failed ({describe(error)})") from error
    return tokens, ends


def difference(name: str, text: str, wanted: np.ndarray, found: np.ndarray, encoding: tiktoken.Encoding) -> str:
    """A clause that shows where `found` leaves the tokens that are `wanted` for `text`."""
    shared = min(len(wanted), len(found))
    differing = np.flatnonzero(wanted[:shared] != found[:shared])
    first = int(differing[0]) if len(differing) else shared
    byte = len(encoding.decode_bytes(wanted[:first].tolist()))
    excerpt = text.encode("utf-8", "replace")[max(0, byte - EXCERPT) : byte + EXCERPT].decode("utf-8", "replace")
    return (
        f"{name} gives {found[first : first + 4].tolist()} where tiktoken gives {wanted[first : first + 4].tolist()}, "
        f"byte {byte} of a text of {len(text):,} characters, at {excerpt!r}"
    )


def nasty_texts(encoding: tiktoken.Encoding) -> list[str]:
    """The texts of the self-test, the same each time; about 2.5 MB."""
    rng = random.Random(0)
    pieces = [*BLANKS, *WORDS, *SIGNS]
    mixed = "".join(rng.choices([*pieces, *WORDS, *WORDS], k=40_000))
    source = "".join(_source_lines(rng, 3000))
    tokens = itertools.islice(_scattered(list(encoding._mergeable_ranks)), 30_000)
    vocabulary = b"".join(tokens).decode("utf-8", "replace")
    long = source + mixed[:40_000]
    return [
        *pieces,
        "",
        *(left + right for left in (*SIGNS, "a", "A", "é", "中", "1") for right in (*BLANKS, *SIGNS)),
        *_cut(mixed, 300),
        *_cut(vocabulary, 5000),
        *_cut("".join(_swept()), 20_000),
        *(piece * 3000 for piece in RUNS),
        *(" " * length + end for length in (*range(1, 100), 127, 128, 129, 255, 256) for end in ("", "x", "\n")),
        long,
        long + "x",
        long[:-1] + "\n\n ",
        long.replace("\n", "\r\n"),
    ]


def _source_lines(rng: random.Random, lines: int) -> Iterator[str]:
    stems = ("get", "Value", "_index", "HTTP", "node", "s", "Tmp2", "über", "data_", "Config", "i", "XML", "parse", "2")
    joints = (" = ", "(", ")", ", ", ": ", ".", "[", "]", " + ", " == ", "'", '"', "->", " # ", "  ", "**", "\\", ";")
    names = ["".join(rng.choices(stems, k=rng.randint(1, 4))) for _ in range(1500)]
    for _ in range(lines):
        parts = zip(rng.choices(names, k=6), rng.choices(joints, k=6), strict=True)
        end = rng.choice(("\n", "\n", "\n\n", " \n", "\n\n\n", f"{rng.randrange(10**9)}\n"))
        yield "    " * rng.randrange(6) + "".join(itertools.chain.from_iterable(parts)) + end


def _scattered(tokens: list[bytes]) -> Iterator[bytes]:
    """All tokens, neighbours far apart."""
    step = 617
    return itertools.chain.from_iterable(tokens[start::step] for start in range(step))


def _swept() -> Iterator[str]:
    """Each code point among its neighbours, then where its kind (letter, digit, blank, other) changes the tokens."""
    for points in SWEPT:
        for start in range(0, len(points), 64):
            letters = [chr(point) for point in points[start : start + 64]]
            yield "".join(letters)
            yield "".join(f"{letter}'s{letter}1234  {letter}  x{letter}\n" for letter in letters)


def _cut(text: str, length: int) -> Iterator[str]:
    return (text[start : start + length] for start in range(0, len(text), length))
