"""fastokens and quicktok give tiktoken's tokens for any text; what is not installed or disagrees is refused by name."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blues.data import fast_tokenizers as fast
from blues.data import parity
from blues.data.fast_tokenizers import LONG_S, FastTokenizer
from blues.data.parity import UNICODE_17
from blues.data.tokenizer import load_encoding
from blues.errors import ConfigError, DataError

NAMES = list(fast.BACKENDS)
SIZES = (257, 300, 4096, None)
LAW = settings(max_examples=40, deadline=None)

letters = st.characters(exclude_categories=["Cs"])
texts = st.one_of(
    st.text(letters, max_size=80),
    st.text("aAé '\n\r\t中1.<|>\u0301\u2028sStTrReEvVlLmMdD/_K", max_size=80),
    st.lists(st.sampled_from([*parity.BLANKS, *parity.WORDS, *parity.SIGNS]), max_size=40).map("".join),
    st.tuples(st.text(letters, min_size=1, max_size=3), st.integers(1, 3000)).map(lambda pair: pair[0] * pair[1]),
)


@functools.cache
def build(name: str, vocab_size: int | None) -> FastTokenizer:
    return fast.open_backend(name, load_encoding(vocab_size))


def equal_to_tiktoken(name: str, vocab_size: int | None, batch: list[str]) -> None:
    encoding = load_encoding(vocab_size)
    tokens, ends = build(name, vocab_size).encode(batch)
    assert tokens.dtype == np.uint32 and len(ends) == len(batch) + 1
    for text, (start, stop) in zip(batch, pairwise(ends.tolist()), strict=True):
        wanted = encoding.encode_to_numpy(text, disallowed_special=())
        found = tokens[start:stop]
        assert np.array_equal(found, wanted), parity.difference(name, text, wanted, found, encoding)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
@LAW
@given(batch=st.lists(texts, max_size=6))
@example(batch=["<|endoftext|>", "", "I'LL we'Re", " " * 100_000, "x" + "\n" * 100_000, "a" * 100_000, "\U00033257's"])
def test_it_equals_tiktoken_on_any_text(name, size, batch):
    equal_to_tiktoken(name, size, [text.replace(LONG_S, "s") for text in batch])


@pytest.mark.parametrize("name", NAMES)
def test_it_equals_tiktoken_on_the_standard_library(name):
    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    equal_to_tiktoken(name, None, [path.read_text(encoding="utf-8") for path in paths])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_equals_tiktoken_at_every_character_of_unicode(name):
    for start in range(0, 0x110000, 1 << 14):
        points = (point for point in range(start, start + (1 << 14)) if not 0xD800 <= point < 0xE000)
        marks = [chr(point) for point in points if chr(point) != LONG_S]
        batch = [f"{c}'s{c}1234  {c}  x{c}X{c}{c}a A{c} a{c}1 '{c} {c}{c}\n{c}\n\n /{c}/'{c}a'{c}s" for c in marks]
        equal_to_tiktoken(name, None, batch)


def test_a_long_s_is_why_texts_are_kept_from_the_fast_backends():
    """The day they agree, `unlike` can go."""
    encoding = load_encoding(None)
    text = f"e'{LONG_S}'res"  # tiktoken cuts it after the first contraction, they at the first apostrophe
    wanted = encoding.encode_ordinary(text)
    assert all(build(name, None).encode([text])[0].tolist() != wanted for name in NAMES)
    assert all(build(name, None).unlike == LONG_S for name in NAMES)


def test_quicktok_needs_the_characters_of_unicode_17_removed(monkeypatch):
    """The day tiktoken knows them (or quicktok no longer does), the list can go."""
    for first, last in UNICODE_17:
        equal_to_tiktoken("quicktok", None, [f"{chr(point)}'s1{chr(point)}1234" for point in (first, last)])
    monkeypatch.setattr(fast, "_without_characters", lambda table, removed: table)
    with pytest.raises(DataError, match=r"'quicktok' failed its self-test: quicktok gives .* where tiktoken gives"):
        fast.open_backend("quicktok", load_encoding(None))


def test_characters_are_removed_from_a_table_of_kinds():
    def table(*kinds: list[tuple[int, int]]) -> bytes:
        return b"".join(np.array([len(kind), *np.ravel(kind)], dtype="<u4").tobytes() for kind in kinds)

    before = table([(0, 9), (20, 29), (0x10FFFF, 0x10FFFF)], [], [(5, 5)])
    assert fast._without_characters(before, ()) == before
    after = table([(0, 3), (7, 9), (20, 23), (25, 29)], [], [])
    assert fast._without_characters(before, ((4, 6), (24, 24), (0x10FFFF, 0x10FFFF))) == after


@pytest.mark.parametrize("name", NAMES)
def test_a_package_that_is_not_there_is_named_with_the_line_that_installs_it(name, monkeypatch):
    for module in [module for module in sys.modules if module.partition(".")[0] == name] + [name]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"'{name}' is not installed .*pip install '{name}.*>=\d.*'tiktoken'"):
        fast.open_backend(name, load_encoding(300))


@pytest.mark.parametrize("name", NAMES)
def test_a_package_of_another_version_is_an_error_that_says_so(name, monkeypatch):
    monkeypatch.setattr(fast.BACKENDS[name], "__init__", lambda self, ranks, pattern: self.gone())
    with pytest.raises(ConfigError, match=rf"'{name}' cannot be used \(AttributeError: .*gone.*\); pip install"):
        fast.open_backend(name, load_encoding(300))


def test_quicktok_refuses_a_pattern_it_does_not_know():
    with pytest.raises(ConfigError, match=r"quicktok has no scanner for the pattern"):
        fast.Quicktok({bytes([byte]): byte for byte in range(256)}, r"\S+|\s+")


@pytest.mark.parametrize("name", NAMES)
def test_a_backend_that_lies_is_refused_by_the_self_test(name, monkeypatch):
    kind = fast.BACKENDS[name]
    encode = kind.encode
    monkeypatch.setattr(kind, "encode", lambda self, texts: encode(self, [text.replace("\r", "\n") for text in texts]))
    with pytest.raises(DataError, match=rf"'{name}' failed its self-test: .*at '.*\\r.*'; use the backend 'tiktoken'"):
        fast.open_backend(name, load_encoding(4096))


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_on_one_thread_and_leaves_the_environment_alone(name):
    code = f"""
import os, psutil
from blues.data import fast_tokenizers
from blues.data.tokenizer import load_encoding
encoding = load_encoding(300)
before = dict(os.environ), psutil.Process().num_threads()
backend = fast_tokenizers.BACKENDS[{name!r}](encoding._mergeable_ranks, encoding._pat_str)
backend.encode(["some words of a text\\n" * 2000] * 200)
assert (dict(os.environ), psutil.Process().num_threads()) == before
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FASTOKENS")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_memory_stays_bounded_over_text_never_seen_before(name):
    code = f"""
import numpy as np, psutil
from blues.data.fast_tokenizers import BACKENDS
from blues.data.tokenizer import load_encoding
encoding = load_encoding(None)
backend = BACKENDS[{name!r}](encoding._mergeable_ranks, encoding._pat_str)
alphabet = "abcdefghijklmnopqrstuvwxyz" * 2 + "ABC_(). 012\\n" + " " * 8 + "éж中"
rng, letters = np.random.default_rng(0), np.frombuffer(alphabet.encode("utf-32-le"), dtype="<u4")
sizes = []
for batch in range(320):
    text = letters[rng.integers(0, len(letters), 1 << 20)].tobytes().decode("utf-32-le")
    backend.encode([text[start : start + 10_000] for start in range(0, len(text), 10_000)])
    sizes.append(psutil.Process().memory_info().rss >> 20)
print(sizes)
assert sizes[-1] - sizes[80] < 16, "MB over the last 250 MB of text"
assert sizes[-1] < 500
"""
    subprocess.run([sys.executable, "-c", code], check=True)
