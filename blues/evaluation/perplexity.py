"""How well a model predicts text: cross-entropy per token, perplexity, bits per byte.

In: a model and token ids. Out: `Score`s, which add up over texts, documents and sources.

A text longer than the model's context is read through sliding windows that overlap, and every token but the first is
scored exactly once, in the window that gives it the most context left of it.

Legend: B windows of a batch, T inputs of a window, N tokens of a text, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blues.data.tokenizer import Tokenizer

IGNORED = -100
"""Target of positions that are context only."""


def perplexity(cross_entropy: float) -> float:
    """exp of nats per token; infinite where a float64 cannot hold it."""
    return math.exp(cross_entropy) if not cross_entropy > 700 else math.inf


@dataclass(frozen=True)
class Score:
    """A sum over scored tokens: `nats` of negative log-likelihood, and the `bytes` those tokens decode to.

    End-of-text tokens count as tokens with their nats and as zero bytes.
    """

    tokens: int = 0
    nats: float = 0.0
    bytes: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.tokens + other.tokens, self.nats + other.nats, self.bytes + other.bytes)

    @property
    def cross_entropy(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the cross-entropy per token."""
        return perplexity(self.cross_entropy)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, unlike the other two; NaN if the tokens decode to nothing."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


@dataclass(frozen=True)
class Window:
    """Reads tokens `[start, stop)`; scores those at positions `[first_scored, stop)`, each from those before it."""

    start: int
    first_scored: int
    stop: int


@dataclass(frozen=True)
class Windows(Sequence[Window]):
    """The windows over a text of `length` tokens: they score positions 1..length-1 once each, in order.

    A window holds at most `context` inputs and moves on by `stride` (1..context) tokens; all windows of a text longer
    than `context` are full, so they can be stacked.
    """

    length: int
    context: int
    stride: int

    def __len__(self) -> int:
        if self.length < 2:
            return 0
        return 1 + max(0, -(-(self.length - 1 - self.context) // self.stride))

    @overload
    def __getitem__(self, index: int) -> Window: ...
    @overload
    def __getitem__(self, index: slice) -> list[Window]: ...
    def __getitem__(self, index: int | slice) -> Window | list[Window]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        first = 1 if index == 0 else self.context + 1 + (index - 1) * self.stride
        stop = min(self.length, self.context + 1 + index * self.stride)
        return Window(max(0, stop - self.context - 1), first, stop)


def spread(plan: Windows, max_tokens: int) -> Iterator[Window]:
    """As many windows, evenly spaced, as score about `max_tokens` tokens; at least one. 0 = all of them."""
    count = len(plan)
    if max_tokens and plan.length - 1 > max_tokens:
        count = max(1, min(count, max_tokens // plan.stride))
    return (plan[index * len(plan) // count] for index in range(count))


def score_tokens(model: Any, tokens_N: NDArray[np.integer] | Sequence[int], *, context: int, **options: Any) -> Score:
    """The score of one text, every token but the first once; `stride` is half the context unless given.

    Options as in `score_windows`.
    """
    tokens_N = np.asarray(tokens_N, dtype=np.int64)
    stride = options.pop("stride", 0) or max(1, context // 2)
    plan = Windows(len(tokens_N), context, stride)
    return score_windows(model, lambda start, stop: tokens_N[start:stop], plan, **options)


@torch.inference_mode()
def score_windows(
    model: Any,
    read: Callable[[int, int], NDArray[np.integer]],
    plan: Iterable[Window],
    *,
    byte_lengths_V: NDArray[np.integer],
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    observe: Callable[[Sequence[Any], Tensor], None] | None = None,
) -> Score:
    """Score the windows of `plan`, which are equally long (as `Windows` makes them).

    `model(tokens_BT, targets_BT)` returns the mean cross-entropy over the targets that are not `IGNORED`.
    `read(start, stop)`: tokens of the text. `byte_lengths_V`: bytes that each token id decodes to (`byte_lengths`).
    `observe(routing, scored)`: sees the routing of every forward pass, and which of its B*T tokens predict a scored
    token (bool), so that no token is counted twice.
    """
    score = Score()
    iterator = iter(plan)
    while group := list(islice(iterator, batch_size)):
        inputs_BT, targets_BT = _arrays(read, group)
        scored_BT = targets_BT != IGNORED
        targets = targets_BT[scored_BT]
        output = model(torch.from_numpy(inputs_BT).to(device), torch.from_numpy(targets_BT).to(device))
        nats = float(output.losses.cross_entropy) * targets.size
        score += Score(tokens=targets.size, nats=nats, bytes=int(byte_lengths_V[targets].sum()))
        if observe is not None:
            observe(output.routing, torch.from_numpy(scored_BT.reshape(-1)).to(device))
    return score


def _arrays(
    read: Callable[[int, int], NDArray[np.integer]], group: Sequence[Window]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`inputs_BT, targets_BT`: targets that a window does not score are `IGNORED`."""
    spans = np.stack([np.asarray(read(window.start, window.stop), dtype=np.int64) for window in group])
    targets_BT = spans[:, 1:].copy()
    for row, window in enumerate(group):
        targets_BT[row, : window.first_scored - window.start - 1] = IGNORED
    return spans[:, :-1].copy(), targets_BT


def byte_lengths(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Bytes of text that each id in [0, n_vocab) stands for; 0 for the end-of-text token."""
    lengths_V = np.array([len(tokenizer.decode_bytes([token])) for token in range(tokenizer.n_vocab)])
    lengths_V[tokenizer.eot_id] = 0
    return lengths_V
