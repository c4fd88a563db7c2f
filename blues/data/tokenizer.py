"""Text to token ids and back: tiktoken's o200k_base, whole or truncated, from a vendored vocabulary.

In: text. Out: token ids in `[0, n_vocab)`. Special tokens never come from text: a document that contains the
characters `<|endoftext|>` is plain text; the one special token in use, `eot_id`, is only put in by Blues.

A byte pair encoding merges in the order of its ranks, so its first M ranks are themselves an exact byte pair encoding
as long as they hold all 256 bytes: `vocab_size=4096` keeps 4095 ranks and gives the last id to `<|endoftext|>`. Small
models need not carry 200 thousand rows of embeddings.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tiktoken

from blues import config as cfg
from blues.errors import ConfigError, DataError

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
VOCABULARY_PADDING = 64
# tiktoken's regular expression engine panics on a run of a million blanks; longer runs are encoded in cells of this.
LONGEST_BLANK_RUN = 990_000
_BLANK_CELL = re.compile(rf"\s{{{LONGEST_BLANK_RUN}}}")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


class Tokenizer(cfg.Configurable):
    """o200k_base as a `tiktoken.Encoding`; equal configurations share one encoding within a process."""

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

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()
        self.encoding = load_encoding(self.config.vocab_size)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.config,)  # the receiving process loads its own copy of the vocabulary

    @property
    def n_vocab(self) -> int:
        """Number of ids: 200,019 for the whole vocabulary (with 19 unused ones), `vocab_size` otherwise."""
        return self.encoding.n_vocab

    @property
    def eot_id(self) -> int:
        """Id of `<|endoftext|>`, which ends every document."""
        return self.encoding.eot_token

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `n_vocab` rounded up to a multiple of 64 (200,064 for the whole vocabulary)."""
        return -(-self.n_vocab // VOCABULARY_PADDING) * VOCABULARY_PADDING

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that changes the ids of a text."""
        return fingerprint(self.config)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; `decode(encode(text)) == text`. Lone surrogates become U+FFFD."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Like `encode`, as uint32[num_tokens], without the cost of a Python list."""
        if len(text) < LONGEST_BLANK_RUN or _BLANK_CELL.search(text) is None:
            return self._encode_piece(text)
        cuts = [match.end() for match in _BLANK_CELL.finditer(text)]
        pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return np.concatenate([self._encode_piece(piece) for piece in pieces])

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """`[encode(text) for text in texts]` on `num_threads` threads (tiktoken releases the interpreter's lock)."""
        if num_threads <= 1 or len(texts) <= 1:
            return [self.encode(text) for text in texts]
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self.encode, texts))

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

    def _encode_piece(self, text: str) -> np.ndarray:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self.encoding.encode_to_numpy(text, disallowed_special=())

    def _decode_token(self, token: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return _REPLACEMENT


def fingerprint(config: Tokenizer.Config) -> str:
    """`Tokenizer.fingerprint` without loading the vocabulary."""
    identity = f"{config.name}\n{VOCABULARY_SHA256}\n{PATTERN}\n{config.vocab_size}"
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


@functools.cache
def load_ranks() -> dict[bytes, int]:
    """The vendored merge ranks of o200k_base: token bytes -> rank.

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
    pairs = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


@functools.lru_cache(maxsize=4)
def load_encoding(vocab_size: int | None) -> tiktoken.Encoding:
    """The encoding of the whole o200k_base (None), or of its first `vocab_size - 1` ranks and `<|endoftext|>`."""
    ranks = load_ranks()
    if vocab_size is None:
        return tiktoken.Encoding("o200k_base", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=SPECIAL_TOKENS)
    kept = {token: rank for token, rank in ranks.items() if rank < vocab_size - 1}
    return tiktoken.Encoding(
        f"o200k_base_{vocab_size}",
        pat_str=PATTERN,
        mergeable_ranks=kept,
        special_tokens={END_OF_TEXT: vocab_size - 1},
        explicit_n_vocab=vocab_size,
    )
