"""From a prompt to text: prefill, decode one token, sample, repeat.

In: a `LoadedModel` and prompts. Out: `Generation`s, or text piece by piece.

    model = load_model("runs/tiny")
    print(sample_text(model, "def ", max_length=64, temperature=0.8))
    for piece in (stream := stream_text(model, "def ")):
        print(piece, end="", flush=True)
    print(stream.generation.summary())

The model sees at most `max_seq_len` tokens, the length it was trained for. A longer prompt is refused; a text that
reaches the limit ends there and says so (`stop == "context"`): nothing slides out of sight unnoticed.

Legend: B rows of a batch, T new tokens, V vocabulary (padded).
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from blues.errors import ConfigError
from blues.inference.cache import Cache
from blues.inference.loading import LoadedModel, load_model
from blues.inference.sampling import Sampling

__all__ = [
    "Generation",
    "LoadedModel",
    "TextStream",
    "Usage",
    "decode_one_token",
    "generate",
    "load_model",
    "prefill",
    "sample_text",
    "stream_text",
]

PREFILL_CHUNK = 512
"""Prompt tokens per forward pass, so that the memory of a long prompt stays bounded."""

SMALL_STEP = 10_000_000
"""Multiplications of a decoding step (active parameters x rows) below which threads gain nothing, see `decode`."""

Stop = Literal["eot", "max_length", "context"]

STOP_REASONS: dict[Stop, str] = {
    "eot": "the model ended the text",
    "max_length": "max_length reached",
    "context": "the model's max_seq_len reached",
}


@dataclass
class Generation:
    """One prompt and what the model made of it. `text` is the continuation alone, without prompt and end token."""

    prompt_ids: list[int]
    new_ids: list[int] = field(default_factory=list)
    stop: Stop | None = None
    text: str = ""


@dataclass
class Usage:
    """What generating cost, summed over the rows of a batch; seconds are wall time."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decoded_tokens: int = 0
    """Tokens made by decode steps: all but the first of each row, which prefill pays for."""

    @property
    def tokens_per_second(self) -> float:
        """Decode speed: tokens after the first of each row, per second of decoding (0 if there were none)."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def summary(self) -> str:
        """E.g. `12 prompt tokens, 64 new tokens, 250.1 tokens/s`."""
        speed = f", {self.tokens_per_second:.1f} tokens/s" if self.decoded_tokens else ""
        return f"{_count(self.prompt_tokens, 'prompt token')}, {_count(self.new_tokens, 'new token')}{speed}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class ByteDecoder(Protocol):
    """The part of a tokenizer that streaming text needs."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...


class TextDecoder:
    """Token ids in, text out: bytes of a character that is not complete yet are held back until they are.

    All pieces joined equal the whole ids decoded at once, invalid bytes replaced by U+FFFD.
    """

    def __init__(self, tokenizer: ByteDecoder) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that this token completes, perhaps none."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """What the held-back bytes amount to at the end of the text."""
        return self._decoder.decode(b"", final=True)


def prefill(model: Any, prompts: Sequence[Sequence[int]], cache: Cache) -> Tensor:
    """Read whole prompts (token ids, each at least one, lengths may differ) into an empty `cache`.

    Returns `logits_BV`: what follows each prompt's last token. Shorter prompts are padded on the right; the padding
    is invisible to real tokens by the causal rule and is overwritten by the row's next tokens.
    """
    device = cache.k_LBSGC.device
    longest = max(map(len, prompts))
    last_V: dict[int, Tensor] = {}
    for start in range(0, longest, PREFILL_CHUNK):
        width = min(PREFILL_CHUNK, longest - start)
        parts = [list(prompt[start : start + width]) for prompt in prompts]
        tokens_BT = torch.tensor([part + [0] * (width - len(part)) for part in parts], device=device)
        ends = {
            row: len(prompt) - start - 1 for row, prompt in enumerate(prompts) if 0 <= len(prompt) - start - 1 < width
        }
        wanted = width - min(ends.values()) if ends else 0  # logits are dear: only from the first prompt's end on
        logits_BTV = _forward(model, tokens_BT, [len(part) for part in parts], cache, wanted)
        last_V.update({row: logits_BTV[row, end - width].clone() for row, end in ends.items()})
    return torch.stack([last_V[row] for row in range(len(prompts))])


def decode_one_token(model: Any, tokens_B: Tensor, cache: Cache) -> Tensor:
    """Read one more token per row; returns `logits_BV` of what follows it."""
    return _forward(model, tokens_B[:, None], [1] * len(tokens_B), cache, 1)[:, -1]


def _forward(model: Any, tokens_BT: Tensor, counts: Sequence[int], cache: Cache, num_logits: int) -> Tensor:
    """Logits of the last `num_logits` of these tokens, of which `counts[row]` are real and the rest padding."""
    # Rows of one length need no mask of their own; saying nothing lets attention use its causal fast path.
    positions_BT = None if cache.even else cache.positions(tokens_BT.shape[1])
    logits_BTV = model(tokens_BT, cache=cache, positions=positions_BT, num_logits=num_logits).logits_BTV
    cache.advance(counts)
    return logits_BTV


@torch.inference_mode()
def decode(
    loaded: LoadedModel, generations: Sequence[Generation], config: Sampling.Config, usage: Usage
) -> Iterator[list[tuple[int, int]]]:
    """The decoding loop over a batch: yields the `(row, token)` pairs of every step and fills `generations`.

    A row ends at the end-of-text token (which is not part of its text), after `max_length` new tokens, or when it
    fills the model's context; it then leaves the batch. Rows draw from streams of their own, so a row's tokens do
    not depend on its companions beyond rounding.

    On a CPU a small step runs on one thread: on two idle cores a second one gains less than 5%, and where another
    process takes its core, threads waiting for each other made decoding 20 times slower.
    """
    prompts = [generation.prompt_ids for generation in generations]
    sampler = Sampling(config, allowed_V=loaded.allowed_V, rows=len(prompts))
    longest = max(map(len, prompts))
    cache = loaded.make_cache(len(prompts), min(longest + config.max_length, loaded.max_seq_len))
    rows, active = list(range(len(prompts))), loaded.num_active_parameters
    usage.prompt_tokens += sum(map(len, prompts))
    began = time.perf_counter()
    logits_BV = prefill(loaded.model, prompts, cache)
    decoding = False
    while True:
        tokens_B = sampler(logits_BV, rows)
        tokens = tokens_B.tolist()
        step = [(row, token) for row, token in zip(rows, tokens, strict=True) if token != loaded.tokenizer.eot_id]
        for row, token in zip(rows, tokens, strict=True):
            _append(generations[row], token, loaded, config)
        now = time.perf_counter()
        usage.new_tokens += len(step)
        if decoding:
            usage.decode_seconds += now - began
            usage.decoded_tokens += len(rows)
        else:
            usage.prefill_seconds += now - began
        yield step
        alive = [index for index, row in enumerate(rows) if generations[row].stop is None]
        if not alive:
            return
        began, decoding = time.perf_counter(), True
        if len(alive) < len(rows):
            rows = [rows[index] for index in alive]
            tokens_B = tokens_B[torch.tensor(alive, device=tokens_B.device)]
            cache.select(alive)
        with one_thread(loaded.device.type == "cpu" and active * len(rows) < SMALL_STEP):
            logits_BV = decode_one_token(loaded.model, tokens_B, cache)


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """Computes on one thread inside the block, if `wanted`."""
    if not wanted:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _append(generation: Generation, token: int, loaded: LoadedModel, config: Sampling.Config) -> None:
    if token == loaded.tokenizer.eot_id:
        generation.stop = "eot"
        return
    generation.new_ids.append(token)
    if len(generation.new_ids) >= config.max_length:
        generation.stop = "max_length"
    elif len(generation.prompt_ids) + len(generation.new_ids) >= loaded.max_seq_len:
        generation.stop = "context"


def prompt_ids(loaded: LoadedModel, prompt: str) -> list[int]:
    """The prompt's token ids; an empty prompt is the end-of-text token, after which a document begins.

    Raises:
        ConfigError: the prompt leaves no room in the model's context.
    """
    ids = loaded.tokenizer.encode(prompt) or [loaded.tokenizer.eot_id]
    if len(ids) >= loaded.max_seq_len:
        raise ConfigError(
            f"the prompt has {len(ids):,} tokens, but the model of {str(loaded.path)!r} sees "
            f"{loaded.max_seq_len:,} at once (model.max_seq_len); shorten it to {loaded.max_seq_len - 1:,} tokens"
        )
    return ids


def generate(
    loaded: LoadedModel, prompts: Sequence[str], *, usage: Usage | None = None, **sampling: Any
) -> list[Generation]:
    """Continue a batch of prompts of any lengths; `sampling` as in `sample_text`. `usage` is added to if given."""
    config = loaded.sampling.override(sampling)
    if not prompts:
        return []
    generations = [Generation(prompt_ids(loaded, prompt)) for prompt in prompts]
    for _ in decode(loaded, generations, config, usage if usage is not None else Usage()):
        pass
    for generation in generations:
        generation.text = loaded.tokenizer.decode_bytes(generation.new_ids).decode("utf-8", errors="replace")
    return generations


def sample_text(loaded: LoadedModel, prompt: str, **sampling: Any) -> str:
    """The model's continuation of `prompt` (without the prompt itself).

    `sampling`: fields of `Sampling.Config` (max_length, temperature, top_p, top_k, seed) that differ from those the
    run was configured with. The same seed gives the same text.

    Raises:
        ConfigError: an unknown or impossible setting, or a prompt longer than the model's context.
    """
    return generate(loaded, [prompt], **sampling)[0].text


class TextStream:
    """Iterates over the continuation's text as it is made; never yields a broken character.

    `generation` and `usage` are complete once the iteration has ended.
    """

    def __init__(self, loaded: LoadedModel, prompt: str, config: Sampling.Config) -> None:
        self.generation = Generation(prompt_ids(loaded, prompt))
        self.usage = Usage()
        self._pieces = self._run(loaded, config)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def _run(self, loaded: LoadedModel, config: Sampling.Config) -> Iterator[str]:
        decoder = TextDecoder(loaded.tokenizer)
        for step in decode(loaded, [self.generation], config, self.usage):
            for _, token in step:
                yield from self._emit(decoder.push(token))
        yield from self._emit(decoder.finish())

    def _emit(self, piece: str) -> Iterator[str]:
        if piece:
            self.generation.text += piece
            yield piece

    def summary(self) -> str:
        """One line: prompt tokens, new tokens, tokens/s, why it stopped."""
        stop = self.generation.stop
        return f"{self.usage.summary()}; stopped: {STOP_REASONS[stop] if stop else 'interrupted'}"


def stream_text(loaded: LoadedModel, prompt: str, **sampling: Any) -> TextStream:
    """As `sample_text`, but the text comes piece by piece."""
    return TextStream(loaded, prompt, loaded.sampling.override(sampling))
