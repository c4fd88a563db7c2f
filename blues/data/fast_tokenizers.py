"""Fast encoders behind tiktoken: fastokens and quicktok, made from the same ranks and believed while they agree.

In: a tiktoken encoding, the name of a backend. Out: a `FastTokenizer` that has given tiktoken's tokens for the texts of
the self-test (`blues.data.parity`), or an error that says why there is none.

Both are optional packages (`pip install 'blues[fast]'`). Neither learns of a special token, so none ever comes of text.
Both use one thread here: work is spread over processes. Both keep what they remember of earlier words in tables of
fixed size.
"""

from __future__ import annotations

import base64
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tiktoken

from blues.data import parity
from blues.errors import ConfigError, DataError

LONG_S = "\N{LATIN SMALL LETTER LONG S}"
"""Where case does not matter it is an s: tiktoken takes an apostrophe and a long s for the contraction 's, and the
others know contractions in ASCII only."""


class FastTokenizer(ABC):
    """A byte pair encoder that takes many texts at a time."""

    name: ClassVar[str]
    requirement: ClassVar[str]
    """What pip installs."""
    one_in: ClassVar[int]
    """Of how many documents one is encoded again with tiktoken. A power of two, chosen so that it costs about 1%."""

    unlike: ClassVar[str]
    """A character at which it is known to differ from tiktoken: texts that hold it are not for this backend."""

    @abstractmethod
    def __init__(self, ranks: Mapping[bytes, int], pattern: str) -> None:
        """Load the encoding with these `ranks` (token bytes -> id, from 0 without gaps) and this piece `pattern`."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of all texts end to end, uint32, and int64[len(texts) + 1]: where each text begins and ends."""


class Fastokens(FastTokenizer):
    """https://github.com/crusoecloud/fastokens (Rust): remembers words, 5 to 15 times as fast as tiktoken."""

    name = "fastokens"
    requirement = "fastokens>=0.3.5"
    one_in = 2048
    unlike = LONG_S

    def __init__(self, ranks: Mapping[bytes, int], pattern: str) -> None:
        from fastokens._native import Tokenizer

        with tempfile.TemporaryDirectory(prefix="blues-") as folder:
            file = Path(folder) / "ranks.tiktoken"
            file.write_bytes(b"".join(b"%b %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()))
            self._tokenizer: Any = Tokenizer.from_tiktoken(str(file), pattern=pattern, special_tokens={})
        with _one_thread():  # it reads the number of threads once, when the first batch comes
            self._tokenizer.encode_batch_flat(["a batch of some size\n" * 10] * 64)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        tokens, ends = self._tokenizer.encode_batch_flat(texts)
        return np.frombuffer(tokens, dtype="<u4"), np.frombuffer(ends, dtype="<i8")


class Quicktok(FastTokenizer):
    """https://github.com/dmatth1/quicktok (C++): no memory of words, the pattern compiled by hand, 2 to 4 times as
    fast as tiktoken."""

    name = "quicktok"
    requirement = "quicktok-v1>=0.4.0"
    one_in = 512
    unlike = LONG_S

    def __init__(self, ranks: Mapping[bytes, int], pattern: str) -> None:
        import quicktok
        from quicktok import _import_core as files

        scanner = files.KNOWN_PATTERNS.get(pattern)
        if scanner is None:
            raise ConfigError(f"quicktok has no scanner for the pattern {pattern!r}")
        with tempfile.TemporaryDirectory(prefix="blues-") as folder:
            files.write_files(folder, "blues", ranks, {}, scanner, False)
            for table in files.tables_for(scanner, False):
                content = (Path(quicktok.__file__).parent / "data" / table).read_bytes()
                (Path(folder) / table).write_bytes(_without_characters(content, parity.UNICODE_17))
            self._tokenizer: Any = quicktok.Tokenizer("blues", folder)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self._tokenizer.encode_batch(texts, threads=1)


BACKENDS: dict[str, type[FastTokenizer]] = {kind.name: kind for kind in (Fastokens, Quicktok)}
"""The fast backends by name, the fastest first."""


def open_backend(name: str, encoding: tiktoken.Encoding) -> FastTokenizer:
    """The backend `name` with the ranks of `encoding`, after it has passed the self-test.

    Raises:
        ConfigError: the package is not installed, or of a version that cannot be used.
        DataError: it does not give tiktoken's tokens.
    """
    kind = BACKENDS[name]
    remedy = f"pip install {kind.requirement!r}, or use the backend 'tiktoken'"
    try:
        backend = kind(encoding._mergeable_ranks, encoding._pat_str)
    except ImportError as error:
        raise ConfigError(f"tokenizer backend {name!r} is not installed ({error}); {remedy}") from None
    except BaseException as error:
        if isinstance(error, ConfigError) or not parity.is_crash(error):
            raise
        raise ConfigError(f"tokenizer backend {name!r} cannot be used ({parity.describe(error)}); {remedy}") from error
    try:
        parity.self_test(backend, encoding)
    except parity.Disagreement as error:
        raise DataError(
            f"tokenizer backend {name!r} failed its self-test: {error}; use the backend 'tiktoken', or another version "
            f"of {kind.requirement.partition('>')[0]}"
        ) from None
    return backend


def _without_characters(table: bytes, removed: Sequence[tuple[int, int]]) -> bytes:
    """quicktok's `table` of the kinds of characters with the `removed` ones of no kind.

    For each kind: how many ranges of code points, then the first and last of each, all little-endian uint32.
    """
    numbers, place = np.frombuffer(table, dtype="<u4"), 0
    kinds: list[np.ndarray] = []
    while place < len(numbers):
        end = place + 1 + 2 * int(numbers[place])
        member = np.zeros(0x110002, dtype=np.int8)  # code point + 1, so that every range has an edge on both sides
        for first, last in numbers[place + 1 : end].reshape(-1, 2).tolist():
            member[first + 1 : last + 2] = 1
        for first, last in removed:
            member[first + 1 : last + 2] = 0
        ranges = np.flatnonzero(np.diff(member)).reshape(-1, 2) - (0, 1)
        kinds += [np.array([len(ranges)]), ranges.ravel()]
        place = end
    return np.concatenate(kinds).astype("<u4").tobytes()


@contextmanager
def _one_thread() -> Iterator[None]:
    """fastokens knows the number of its threads from the environment only."""
    name = "FASTOKENS_BPE_THREADS"
    before = os.environ.get(name)
    os.environ[name] = before or "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
