"""Text to token ids and back: tiktoken's o200k_base, whole or truncated, from a vendored vocabulary.

In: text. Out: token ids in `[0, n_vocab)`. Special tokens never come from text: a document that contains the
characters `<|endoftext|>` is plain text; the one special token in use, `eot_id`, is only put in by Blues.

tiktoken says what the tokens of a text are. Another backend may encode the bulk (`encode_arrays`) faster as long as it
agrees (`blues.data.parity`); which one is no part of a tokenizer's identity, for the tokens are the same.

A byte pair encoding merges in the order of its ranks, so its first M ranks are themselves an exact byte pair encoding
as long as they hold all 256 bytes: `vocab_size=4096` keeps 4095 ranks and gives the last id to `<|endoftext|>`. Small
models need not carry 200 thousand rows of embeddings.
"""

from __future__ import annotations

import binascii
import functools
import hashlib
import logging
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tiktoken

from blues import config as cfg
from blues.data import fast_tokenizers, parity
from blues.errors import BluesError, ConfigError, DataError

logger = logging.getLogger("blues")

VOCABULARY_FILE = Path(__file__).parent / "vocab" / "o200k_base.tiktoken"
VOCABULARY_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
NUM_RANKS = 199_998
WHOLE_VOCABULARY = 200_019
"""Ids of the whole o200k_base: its ranks, its special tokens, and unused ones between them."""
END_OF_TEXT = "<|endoftext|>"
END_OF_PROMPT = "<|endofprompt|>"
# The ids of the whole o200k_base; those between the ranks and the specials are unused.
SPECIAL_TOKENS = {END_OF_TEXT: 199_999, END_OF_PROMPT: 200_018}
PATTERN = "|".join(
    [
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
# tiktoken's regular expression engine panics on a run of a million blanks; longer runs are encoded in cells of this.
LONGEST_BLANK_RUN = 990_000
_BLANK_CELL = re.compile(rf"\s{{{LONGEST_BLANK_RUN}}}")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()
TIKTOKEN = "tiktoken"
FASTEST = "fast"
"""As a backend: the first of `fast_tokenizers.BACKENDS` that is installed and agrees with tiktoken, else tiktoken."""


class Tokenizer(cfg.Configurable):
    """o200k_base as a `tiktoken.Encoding`; equal configurations share one encoding within a process.

    `backend` encodes in `encode_arrays`: "tiktoken", "fast", "fastokens" or "quicktok". A fast one that disagrees with
    tiktoken, or fails, is replaced by tiktoken for good, with a warning, before anything of that batch is given out.
    With `threads`, `encode_arrays` has tiktoken encode so many texts at a time; a fast backend sees to that itself.

    Attributes:
        rechecked: documents of the fast backend that tiktoken encoded as well, to the same tokens.
        fell_back: why tiktoken does the work of a fast backend that was asked for; None where it does not.

    Raises:
        ConfigError: there is no such backend, or the one asked for by name is not installed.
        DataError: the backend asked for by name fails its self-test.
    """

    @cfg.configclass
    class Config(cfg.Config):
        """`vocab_size` is the total number of ids, `<|endoftext|>` included; None is the whole o200k_base."""

        name: Literal["o200k_base"] = "o200k_base"
        vocab_size: int | None = None

        def __post_init__(self) -> None:
            if self.vocab_size is not None and not 257 <= self.vocab_size <= NUM_RANKS + 1:
                raise ConfigError(
                    f"vocab_size: {self.vocab_size} is outside 257 ... {NUM_RANKS + 1} (256 bytes and "
                    f"{END_OF_TEXT} are the least); leave it out (null) for the whole o200k_base"
                )

    config: Config

    def __init__(self, config: Config | None = None, backend: str = TIKTOKEN, threads: int = 1) -> None:
        self.config = config or self.Config()
        self.encoding = load_encoding(self.config.vocab_size)
        self.fell_back: str | None = None
        self._rechecked = 0  # by a backend that was given up
        self._wanted, self._threads = backend, threads
        self._fast = self._open(backend)

    def __reduce__(self) -> tuple[Any, ...]:
        # The receiving process loads its own copy of the vocabulary.
        return type(self), (self.config, self._wanted, self._threads)

    @property
    def backend(self) -> str:
        """What `encode_arrays` runs on by now: "tiktoken", "fastokens" or "quicktok"."""
        return TIKTOKEN if self._fast is None else self._fast.fast.name

    @property
    def rechecked(self) -> int:
        return self._rechecked + (0 if self._fast is None else self._fast.rechecked)

    @property
    def n_vocab(self) -> int:
        """Number of ids: 200,019 for the whole vocabulary (with 19 unused ones), `vocab_size` otherwise."""
        return self.encoding.n_vocab

    @property
    def eot_id(self) -> int:
        """Id of `<|endoftext|>`, which ends every document."""
        return self.encoding.eot_token

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that changes the ids of a text."""
        return fingerprint(self.config)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; `decode(encode(text)) == text`. Lone surrogates become U+FFFD."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Like `encode`, as uint32[num_tokens], without the cost of a Python list. Always tiktoken."""
        if not _has_long_blank_run(text):
            return self._encode_piece(text)
        cuts = [match.end() for match in _BLANK_CELL.finditer(text)]
        pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return np.concatenate([self._encode_piece(piece) for piece in pieces])

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`[encode_array(text) for text in texts]` on the backend: some 1 MB of texts at a time is enough.

        The arrays are not to be written to: those of a fast backend are views of one.
        """
        if self._fast is None:
            return self._encode_all(texts)
        unlike = self._fast.fast.unlike
        apart = {number for number, text in enumerate(texts) if unlike in text or _has_long_blank_run(text)}
        given = ["" if number in apart else text for number, text in enumerate(texts)] if apart else texts
        try:
            arrays = self._fast.encode(given)
        except parity.Disagreement as error:
            whole = [_without_surrogates(text) for text in texts]
            if any(map(str.__ne__, whole, texts)):  # a Python string that is no Unicode: no fault of the backend
                return self.encode_arrays(whole)
            self._fall_back(str(error))
            return self._encode_all(texts)
        for number in apart:
            arrays[number] = self.encode_array(texts[number])
        return arrays

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 and ids that do not exist become U+FFFD, never an error."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Exact bytes of `ids`. An id without a token (unused, padding, out of range) gives the bytes of U+FFFD."""
        tokens = [int(token) for token in ids]
        try:
            return self.encoding.decode_bytes(tokens)
        except (KeyError, OverflowError):
            return b"".join(self._decode_token(token) for token in tokens)

    def _encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._threads == 1 or len(texts) < 2:
            return [self.encode_array(text) for text in texts]
        with ThreadPoolExecutor(self._threads) as pool:  # tiktoken lets go of the interpreter's lock
            return list(pool.map(self.encode_array, texts))

    def _encode_piece(self, text: str) -> np.ndarray:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self.encoding.encode_to_numpy(_without_surrogates(text), disallowed_special=())

    def _open(self, backend: str) -> parity.Rechecked | None:
        if backend == TIKTOKEN:
            return None
        if backend in fast_tokenizers.BACKENDS:
            return self._checked(_open_backend(backend, self.config.vocab_size))
        if backend != FASTEST:
            known = [TIKTOKEN, FASTEST, *fast_tokenizers.BACKENDS]
            raise ConfigError(f"unknown tokenizer backend {backend!r}.{cfg.nearest(backend, known)}")
        failures = []
        for name in fast_tokenizers.BACKENDS:
            try:
                fast = _open_backend(name, self.config.vocab_size)
            except BluesError as error:
                logger.warning("%s", error)
                failures.append(str(error))
            else:
                return self._checked(fast)
        logger.warning(
            "no fast tokenizer can be used: tiktoken does the work, with the same tokens, several times slower"
        )
        self.fell_back = "; ".join(failures)
        return None

    def _checked(self, fast: fast_tokenizers.FastTokenizer) -> parity.Rechecked:
        return parity.Rechecked(fast, self.encode_array, self.encoding)

    def _fall_back(self, reason: str) -> None:
        logger.warning(
            "tokenizer backend %r is given up: %s; tiktoken encodes this batch again and all that follow. %d documents "
            "of earlier batches had been re-checked and were right, the others may not be: prepare again, with the "
            "backend 'tiktoken', what this process has prepared",
            self.backend,
            reason,
            self.rechecked,
        )
        self._rechecked = self.rechecked
        self._fast, self._wanted, self.fell_back = None, TIKTOKEN, reason

    def _decode_token(self, token: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return _REPLACEMENT


def fingerprint(config: Tokenizer.Config) -> str:
    """`Tokenizer.fingerprint` without loading the vocabulary."""
    identity = f"{config.name}\n{VOCABULARY_SHA256}\n{PATTERN}\n{config.vocab_size}"
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def load_ranks(count: int = NUM_RANKS) -> dict[bytes, int]:
    """The first `count` of the vendored merge ranks of o200k_base: token bytes -> rank.

    Raises:
        DataError: the file is missing or not the one that was published.
    """
    try:
        content = VOCABULARY_FILE.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read the vocabulary {str(VOCABULARY_FILE)!r} ({error.strerror}); install blues again"
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != VOCABULARY_SHA256:
        raise DataError(
            f"the vocabulary {str(VOCABULARY_FILE)!r} is damaged: sha256 {found[:12]}..., expected "
            f"{VOCABULARY_SHA256[:12]}...; install blues again"
        )
    # Lines of a token in base64 and its rank, which counts up from 0. Every process pays for this loop.
    words = content.split(maxsplit=2 * count)
    return dict(zip(map(binascii.a2b_base64, words[0 : 2 * count : 2]), range(count), strict=True))


@functools.lru_cache(maxsize=4)
def load_encoding(vocab_size: int | None) -> tiktoken.Encoding:
    """The encoding of the whole o200k_base (None), or of its first `vocab_size - 1` ranks and `<|endoftext|>`."""
    if vocab_size is None:
        return tiktoken.Encoding(
            "o200k_base", pat_str=PATTERN, mergeable_ranks=load_ranks(), special_tokens=SPECIAL_TOKENS
        )
    return tiktoken.Encoding(
        f"o200k_base_{vocab_size}",
        pat_str=PATTERN,
        mergeable_ranks=load_ranks(vocab_size - 1),
        special_tokens={END_OF_TEXT: vocab_size - 1},
        explicit_n_vocab=vocab_size,
    )


@functools.lru_cache(maxsize=4)
def _open_backend(name: str, vocab_size: int | None) -> fast_tokenizers.FastTokenizer:
    return fast_tokenizers.open_backend(name, load_encoding(vocab_size))


def _has_long_blank_run(text: str) -> bool:
    return len(text) >= LONGEST_BLANK_RUN and _BLANK_CELL.search(text) is not None


def _without_surrogates(text: str) -> str:
    """`text` with pairs of surrogates joined and lone ones replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
