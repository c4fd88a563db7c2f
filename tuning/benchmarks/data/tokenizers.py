"""Tokenizers without anything around them: the text is in memory, the tokens are thrown away.

In: `meter` and a corpus. Out: MB/s and the number of tokens. Loading and reading are not counted.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blues.data import tokenizer as tok

if TYPE_CHECKING:
    from tuning.benchmarks.worker import Meter

MB = 1e6
BATCH_BYTES = 4_000_000
"""Text that is handed to a tokenizer at a time: tokens of a whole corpus as Python integers would fill the memory."""

Encode = Callable[[Sequence[str]], int]
"""Encodes texts and returns how many tokens that were."""


def tiktoken_encoder(threads: int) -> Encode:
    """tiktoken's `encode_ordinary_batch`."""
    encoding = tok.load_encoding(None)
    return lambda texts: sum(map(len, encoding.encode_ordinary_batch(list(texts), num_threads=threads)))


def fastokens_encoder(threads: int) -> Encode:
    """fastokens' `encode_batch_flat`; the number of threads is rayon's, given by the environment."""
    from fastokens._native import Tokenizer

    built = Tokenizer.from_tiktoken(str(tok.VOCABULARY_FILE), pattern=tok.PATTERN, special_tokens={})
    return lambda texts: len(built.encode_batch_flat(list(texts))[0]) // 4


ENCODERS: dict[str, Callable[[int], Encode]] = {"tiktoken": tiktoken_encoder, "fastokens": fastokens_encoder}


def threads(meter: type[Meter], corpus: str, encoder: str, count: int) -> dict:
    """One process with `count` threads."""
    batches = read_batches(corpus)
    encode = ENCODERS[encoder](count)
    encode(["def f():\n    return 1\n"])
    with meter() as spent:
        tokens = sum(encode(batch) for batch in batches)
    return _rates(batches, spent.seconds, spent.cpu_s, tokens)


def processes(meter: type[Meter], corpus: str, encoder: str, count: int) -> dict:
    """`count` processes of one thread each, that take the batches as they come free."""
    batches = read_batches(corpus)
    context = multiprocessing.get_context("fork")
    ready, counter, answers = context.Barrier(count + 1), context.Value("q", 0), context.Queue()
    shared = (batches, encoder, ready, counter, answers)
    workers = [context.Process(target=_encode_share, args=shared) for _ in range(count)]
    for worker in workers:
        worker.start()
    ready.wait()
    with meter() as spent:
        tokens = sum(answers.get() for _ in workers)
    for worker in workers:
        worker.join()
    return _rates(batches, spent.seconds, spent.whole_cpu_s, tokens)


def _encode_share(batches: list[list[str]], encoder: str, ready: Any, counter: Any, answers: Any) -> None:
    encode, tokens = ENCODERS[encoder](1), 0
    encode(["def f():\n    return 1\n"])
    ready.wait()
    while True:
        with counter.get_lock():
            number = counter.value
            counter.value += 1
        if number >= len(batches):
            break
        tokens += encode(batches[number])
    answers.put(tokens)


def read_batches(corpus: str) -> list[list[str]]:
    """The texts of a corpus in the order of its files, in batches of about BATCH_BYTES."""
    batches: list[list[str]] = [[]]
    size = 0
    for path in sorted(Path(corpus).rglob("*.py")):
        text = path.read_bytes().decode("utf-8")
        batches[-1].append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            batches.append([])
            size = 0
    return [batch for batch in batches if batch]


def _rates(batches: list[list[str]], seconds: float, cpu_s: float | None, tokens: int) -> dict:
    size = int(np.sum([len(text.encode("utf-8")) for batch in batches for text in batch]))
    rates = {"MB/s": size / MB / seconds, "MB/s a core": None if cpu_s is None else size / MB / cpu_s}
    return rates | {"s": seconds, "bytes": size, "tokens": tokens}
