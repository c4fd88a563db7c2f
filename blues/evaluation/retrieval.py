"""Finding again what was said long ago: multi-key retrieval and variable tracking, after RULER (arXiv 2404.06654).

In: a `LoadedModel` and the held-out text of a dataset. Out: a `TaskReport`: how often the right answer beats the wrong
ones that stand in the same text, by length and by depth.

A puzzle is a text of exactly so many tokens: held-out text of the dataset, lines strewn over it, and a question as its
last tokens, whose answer is the one token that comes next. Wrong answers are tokens of the same kind from the same
text, so that a model which only knows what kind of token belongs there is at chance, and a small model that would
never say the answer unasked still shows how far it has come. Everything follows from the seed.

Legend: B puzzles of a batch, T tokens, K answers to choose from (the right one first), V vocabulary, W words.
"""

from __future__ import annotations

import abc
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blues import config as cfg
from blues.data.mixture.batches import Mixture
from blues.data.tokenizer import Tokenizer
from blues.errors import ConfigError
from blues.evaluation.long_context import LongContext
from blues.inference.loading import LoadedModel
from blues.table import align

Tokens = NDArray[np.int64]
MAX_WORDS = 1024
"""Words that names and values are drawn from: the first, and so the most frequent, of the vocabulary."""
GOOD_WORDS = 64
"""With fewer words of three letters or more, as in a tiny vocabulary, single letters are taken too."""

FILLER_TOKENS = 1 << 18
"""Held-out tokens that the text around the lines is taken from, at most."""


class Line(NamedTuple):
    """Tokens that stand together, and where: 0 is the beginning of the text, 1 its end."""

    place: float
    tokens: list[int]


class Puzzle(NamedTuple):
    """What is strewn over the text, what is asked, and the answers to choose from (K), the right one first."""

    lines: list[Line]
    question: list[int]
    answers: list[int]


@dataclass(frozen=True)
class Script:
    """The tokens that puzzles are written with."""

    words_W: Tokens
    newline: list[int]
    equals: list[int]
    prints: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Script:
        """Words are ids that decode to letters, with or without a blank before them."""
        found = [
            (token, match[1])
            for token in range(min(tokenizer.n_vocab, 1 << 15))
            if token != tokenizer.eot_id
            and (match := re.fullmatch(rb" ?([a-zA-Z]+)", tokenizer.decode_bytes([token]))) is not None
        ]
        long = [token for token, letters in found if len(letters) >= 3]
        words = long if len(long) >= GOOD_WORDS else [token for token, _ in found]
        parts = (tokenizer.encode(text) for text in ("\n", " =", "print"))
        return cls(np.array(words[:MAX_WORDS], dtype=np.int64), *parts)

    def assign(self, name: list[int], value: list[int]) -> list[int]:
        """A line `name = value`."""
        return [*self.newline, *name, *self.equals, *value, *self.newline]

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """Different words.

        Raises:
            ConfigError: the vocabulary has fewer.
        """
        if count > len(self.words_W):
            raise ConfigError(f"a puzzle needs {count} different words and the vocabulary has {len(self.words_W)}")
        return rng.choice(self.words_W, size=count, replace=False).tolist()


@dataclass(frozen=True)
class Cell:
    """`count` puzzles of one length and depth: how many were `chosen` right among K answers, `said` right among the
    whole vocabulary (ties count in part), and the `nats` of the right answers among the K."""

    length: int
    depth: float
    count: int
    chosen: float
    said: float
    nats: float

    @property
    def accuracy(self) -> float:
        """Share chosen right."""
        return self.chosen / self.count


@dataclass(frozen=True)
class TaskReport:
    """Cells by rising length and depth; `chance` is the accuracy of guessing."""

    name: str
    cells: tuple[Cell, ...]
    chance: float

    @property
    def lengths(self) -> list[int]:
        """The lengths there are."""
        return sorted({cell.length for cell in self.cells})

    def at(self, length: int) -> Cell:
        """All depths of one length together."""
        cells = [cell for cell in self.cells if cell.length == length]
        sums = (sum(getattr(cell, name) for cell in cells) for name in ("count", "chosen", "said", "nats"))
        return Cell(length, math.nan, *sums)

    def interval(self, length: int) -> tuple[float, float]:
        """95% Wilson score interval of the accuracy at one length."""
        cell = self.at(length)
        return wilson(cell.chosen, cell.count)

    def metrics(self) -> dict[str, float]:
        """`retrieval/256/accuracy` and so on."""
        found = {}
        for length in self.lengths:
            cell = self.at(length)
            found[f"{self.name}/{length}/accuracy"] = cell.accuracy
            found[f"{self.name}/{length}/exact"] = cell.said / cell.count
            found[f"{self.name}/{length}/nats"] = cell.nats / cell.count
        return found

    def to_tree(self) -> dict[str, Any]:
        """Plain values for JSON."""
        cells = [
            {
                "length": cell.length,
                "depth": cell.depth,
                "count": cell.count,
                "accuracy": cell.accuracy,
                "exact": cell.said / cell.count,
                "nats": cell.nats / cell.count,
            }
            for cell in self.cells
        ]
        totals = {str(length): list(self.interval(length)) for length in self.lengths}
        return {"chance": self.chance, "cells": cells, "intervals": totals}

    def table(self) -> str:
        """By length (rows) and depth (columns)."""
        depths = sorted({cell.depth for cell in self.cells})
        rows = [["length", *(f"at {100 * depth:.0f}%" for depth in depths), "all", "95% interval", "exact", "nats"]]
        for length in self.lengths:
            cells = {cell.depth: f"{100 * cell.accuracy:.0f}%" for cell in self.cells if cell.length == length}
            low, high = self.interval(length)
            whole = self.at(length)
            rows.append(
                [
                    f"{length:,}",
                    *(cells[depth] for depth in depths),
                    f"{100 * whole.accuracy:.1f}%",
                    f"{100 * low:.0f}-{100 * high:.0f}%",
                    f"{100 * whole.said / whole.count:.1f}%",
                    f"{whole.nats / whole.count:.3f}",
                ]
            )
        head = (
            f"{self.name}: answers chosen right (chance {100 * self.chance:.0f}%), by length and depth of what is asked"
        )
        return "\n".join([head, *align(rows)])


class Task(LongContext):
    """Puzzles of several lengths, each with what is asked for at several depths."""

    @cfg.configclass
    class Config(LongContext.Config):
        """lengths: tokens of a puzzle; left out: the context, its half and its quarter, where puzzles fit in.
        depths: how many places of what is asked for, evenly spread. samples: puzzles of each length and depth."""

        lengths: tuple[int, ...] = ()
        depths: int = 5
        samples: int = 20

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.depths < 1:
                raise ConfigError(f"depths: must be at least 1, got {self.depths}")

    config: Config
    name: str

    @abc.abstractmethod
    def puzzle(self, script: Script, depth: float, rng: np.random.Generator) -> Puzzle:
        """A puzzle with what is asked for at `depth` (0 to 1)."""

    @abc.abstractmethod
    def num_answers(self) -> int:
        """K."""

    @torch.inference_mode()
    def run(self, loaded: LoadedModel, data: Mixture) -> TaskReport:
        """See the family.

        Raises:
            ConfigError: a length that the model does not have, or into which no puzzle fits.
        """
        script, tokens_N = Script.of(loaded.tokenizer), plain_text(data, loaded.tokenizer.eot_id)
        cells = []
        for length in self._lengths(script, data.config.sequence_length):
            for number in range(self.config.depths):
                depth = number / max(1, self.config.depths - 1)
                scores = torch.zeros(3, dtype=torch.float64)
                for texts, answers in self._batches(script, tokens_N, length, depth):
                    tokens_BT = torch.tensor(texts, device=loaded.device)
                    logits_BV = loaded.model(tokens_BT, num_logits=1).logits_BTV[:, -1]
                    scores += score(logits_BV, torch.tensor(answers, device=loaded.device)).cpu()
                cells.append(Cell(length, depth, self.config.samples, *scores.tolist()))
        return TaskReport(self.name, tuple(cells), 1 / self.num_answers())

    def text(
        self, script: Script, tokens_N: Tokens, length: int, depth: float, number: int
    ) -> tuple[Tokens, list[int]]:
        """Puzzle `number` of a length and depth: its tokens (T), and its answers (K)."""
        rng = np.random.default_rng([self.config.seed, length, round(1000 * depth), number])
        lines, question, answers = self.puzzle(script, depth, rng)
        lines.sort(key=lambda line: line.place)  # stable: lines of one place keep their order
        size = length - len(question) - sum(len(line.tokens) for line in lines)
        start = int(rng.integers(0, len(tokens_N)))
        filler = np.take(tokens_N, np.arange(start, start + size), mode="wrap")
        parts, done = [], 0
        for line in lines:
            place = round(line.place * size)
            parts += [filler[done:place], np.array(line.tokens, dtype=np.int64)]
            done = place
        return np.concatenate([*parts, filler[done:], np.array(question, dtype=np.int64)]), answers

    def _batches(
        self, script: Script, tokens_N: Tokens, length: int, depth: float
    ) -> Iterator[tuple[Tokens, list[list[int]]]]:
        size = self.config.batch_size
        for first in range(0, self.config.samples, size):
            numbers = range(first, min(first + size, self.config.samples))
            found = [self.text(script, tokens_N, length, depth, number) for number in numbers]
            yield np.stack([tokens for tokens, _ in found]), [answers for _, answers in found]

    def _lengths(self, script: Script, context: int) -> list[int]:
        lines, question, _ = self.puzzle(script, 0.5, np.random.default_rng(0))
        least = len(question) + sum(len(line.tokens) for line in lines)
        chosen = self.config.lengths
        if too_long := [length for length in chosen if length > context]:
            raise ConfigError(f"lengths: the model sees {context:,} tokens at once, got {too_long[0]:,}")
        lengths = chosen or [length for length in (context // 4, context // 2, context) if length >= least]
        if not lengths or min(lengths) < least:
            raise ConfigError(
                f"{self.name}: a puzzle takes {least} tokens, more than a text of {min(lengths, default=context)}; ask "
                "for longer ones (lengths), or for smaller puzzles"
            )
        return sorted(lengths)


class Retrieval(Task, variant="retrieval"):
    """Multi-key needle retrieval (RULER, arXiv 2404.06654): many lines `name = value`, one name asked for at the end.

    keys: lines in all; the values of the others are the wrong answers. name_words: words that a name is made of.
    """

    @cfg.configclass
    class Config(Task.Config):
        keys: int = 4
        name_words: int = 2

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.keys < 2 or self.name_words < 1:
                raise ConfigError(f"keys: needs 2 lines or more with names of a word or more, got {self.keys}")

    config: Config
    name = "retrieval"

    def puzzle(self, script: Script, depth: float, rng: np.random.Generator) -> Puzzle:
        """See `Task`."""
        keys, size = self.config.keys, self.config.name_words
        words = script.draw(rng, keys * (size + 1))
        names = [words[size * key : size * (key + 1)] for key in range(keys)]
        values = words[keys * size :]
        places = [depth, *rng.random(keys - 1).tolist()]
        lines = [
            Line(place, script.assign(name, [value])) for place, name, value in zip(places, names, values, strict=True)
        ]
        return Puzzle(lines, [*script.newline, *names[0], *script.equals], values)

    def num_answers(self) -> int:
        """See `Task`."""
        return self.config.keys


class Tracking(Task, variant="tracking"):
    """Variable tracking (RULER, arXiv 2404.06654): `a = value`, `b = a`, `c = b`, far apart; what does c print?

    chains: such chains side by side; the values of the others are the wrong answers. hops: names handed on per chain.
    Repeating what followed a name before leads to the name before it in the chain, and to none of the answers.
    """

    @cfg.configclass
    class Config(Task.Config):
        chains: int = 3
        hops: int = 1

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.chains < 2 or self.hops < 1:
                raise ConfigError(f"chains: needs 2 or more with 1 hop or more, got {self.chains} and {self.hops}")

    config: Config
    name = "tracking"

    def puzzle(self, script: Script, depth: float, rng: np.random.Generator) -> Puzzle:
        """See `Task`. The value of the chain that is asked for stands at `depth`, its hops somewhere behind."""
        chains, hops = self.config.chains, self.config.hops
        words = script.draw(rng, chains * (hops + 2))
        lines = []
        for chain in range(chains):
            value, *names = words[chain * (hops + 2) : (chain + 1) * (hops + 2)]
            begin = depth if chain == 0 else float(rng.random())
            places = [begin, *sorted(rng.uniform(begin, 1.0, hops).tolist())]
            for place, name, given in zip(places, names, [value, *names], strict=False):
                lines.append(Line(place, script.assign([name], [given])))
        asked = words[hops + 1]
        return Puzzle(lines, [*script.newline, *script.prints, asked, *script.equals], words[:: hops + 2])

    def num_answers(self) -> int:
        """See `Task`."""
        return self.config.chains


def score(logits_BV: Tensor, answers_BK: Tensor) -> Tensor:
    """Sums over B, float64: chosen right among K, said right among V, nats of the right one among K. A tie of the
    right answer with others counts as a fair draw among them."""
    logits_BV = logits_BV.double()
    logits_BK = logits_BV.gather(1, answers_BK)
    nats_B = -logits_BK.log_softmax(-1)[:, 0]
    return torch.stack([_draws(logits_BK, logits_BK).sum(), _draws(logits_BK, logits_BV).sum(), nats_B.sum()])


def _draws(logits_BK: Tensor, among_BN: Tensor) -> Tensor:
    best_B1 = among_BN.max(dim=1, keepdim=True).values
    return (logits_BK[:, :1] == best_B1)[:, 0].double() / (among_BN == best_B1).sum(1)


def wilson(hits: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share: honest near 0 and 1, unlike mean +- 2 standard errors."""
    share, square = hits / count, z * z / count
    middle, half = share + square / 2, z * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def plain_text(data: Mixture, eot_id: int) -> Tokens:
    """Up to about FILLER_TOKENS tokens of the dataset, (N,), without the marks that end documents."""
    samples = min(data.num_samples_per_epoch, max(1, FILLER_TOKENS // data.config.sequence_length))
    inputs = data.batch(range(samples)).inputs.numpy().reshape(-1)
    return inputs[inputs != eot_id]
