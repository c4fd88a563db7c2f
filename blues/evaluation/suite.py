"""What a checkpoint knows, as one report: loss per source, bits per byte, and what every expert did.

In: a `LoadedModel` and a text or a dataset. Out: a `Report`, as a table to read or a tree of plain values for JSON.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from blues import config as cfg
from blues.config import Configurable, configclass
from blues.data.merging.merge import Dataset, open_dataset
from blues.errors import ConfigError, DataError
from blues.evaluation.perplexity import Score, Windows, byte_lengths, perplexity, score_windows, spread
from blues.evaluation.unigram import UnigramEntropy, unigram_entropy
from blues.inference.loading import LoadedModel
from blues.model.moe.layer import mixtures
from blues.table import align
from blues.tracking.metrics import ExpertStatistics, ExpertSummary

__all__ = ["Evaluation", "Report", "Result", "UnigramEntropy", "unigram_entropy"]

_LOOKS_LIKE_A_PATH = re.compile(r"\S*/\S*|\S+\.[A-Za-z0-9]{1,5}")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One source (or text): its score, its share of the mixture, and how many tokens it holds in all."""

    name: str
    score: Score
    weight: float
    available: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found. `experts` is None for a model without mixtures, `unigram` for a text."""

    subject: str
    results: tuple[Result, ...]
    experts: ExpertSummary | None
    unigram: UnigramEntropy | None
    context: int
    stride: int

    @property
    def total(self) -> Score:
        """All scored tokens together."""
        return sum((result.score for result in self.results), Score())

    @property
    def cross_entropy(self) -> float:
        """Nats per token of the mixture: the sources' cross-entropies weighted by their shares, as training sees it."""
        return sum(result.weight * result.score.cross_entropy for result in self.results)

    @property
    def bits_per_byte(self) -> float:
        """Of the mixture: its bits per token over its bytes per token."""
        bytes_per_token = sum(result.weight * result.score.bytes / result.score.tokens for result in self.results)
        return self.cross_entropy / math.log(2) / bytes_per_token if bytes_per_token else math.nan

    def to_tree(self) -> dict[str, Any]:
        """Plain values, ready for JSON; what is undefined (bits per byte of no bytes) is None."""
        tree: dict[str, Any] = {
            "subject": self.subject,
            "context": self.context,
            "stride": self.stride,
            "cross_entropy": _defined(self.cross_entropy),
            "perplexity": _defined(perplexity(self.cross_entropy)),
            "bits_per_byte": _defined(self.bits_per_byte),
            "tokens": self.total.tokens,
            "bytes": self.total.bytes,
            "sources": {
                result.name: {
                    "weight": result.weight,
                    "tokens": result.score.tokens,
                    "tokens_available": result.available,
                    "bytes": result.score.bytes,
                    "cross_entropy": _defined(result.score.cross_entropy),
                    "perplexity": _defined(result.score.perplexity),
                    "bits_per_byte": _defined(result.score.bits_per_byte),
                }
                for result in self.results
            },
        }
        if self.unigram is not None:
            tree["unigram"] = {"own": self.unigram.own, "trained": self.unigram.trained}
        if self.experts is not None:
            tree["experts"] = [
                {"layer": layer, "max_violation": violation, "load_entropy": entropy, "load": load}
                for layer, violation, entropy, load in zip(
                    self.experts.layers,
                    self.experts.balance_L,
                    self.experts.load_entropy_L,
                    self.experts.load_LE,
                    strict=True,
                )
            ]
        return tree

    def table(self) -> str:
        """The report as text for a terminal."""
        rows = [["source", "weight", "tokens", "nats/token", "perplexity", "bits/byte"]]
        rows += [
            _cells(r.name, r.weight, r.score.tokens, r.score.cross_entropy, r.score.bits_per_byte) for r in self.results
        ]
        if len(self.results) > 1:
            rows.append(_cells("mixture", 1.0, self.total.tokens, self.cross_entropy, self.bits_per_byte))
        parts = [self.subject, *align(rows)]
        sampled = [r for r in self.results if r.score.tokens < r.available - 1]
        for result in sampled:
            parts.append(f"{result.name}: {result.score.tokens:,} of {result.available:,} tokens, evenly spread.")
        if self.unigram is not None:
            parts.append(
                f"Without context: {self.unigram.own:.4f} nats/token at best (the text's own token frequencies), "
                f"{self.unigram.trained:.4f} with the training split's."
            )
        if self.experts is not None:
            parts.append(expert_table(self.experts))
        return "\n".join(parts)

    def draw_experts(self, path: str | Path) -> Path:
        """Draw the experts' load, layers x experts, as PNG; makes the folder.

        Raises:
            ConfigError: the model has no experts, or there can be no file at `path`.
        """
        if self.experts is None:
            raise ConfigError("the model has no mixture layers, so there is no expert load to draw; leave out --figure")
        from blues.tracking.plots import expert_load_heatmap  # matplotlib: half a second that few evaluations need

        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot draw to {str(path)!r} ({error.strerror}); choose another --figure") from None
        return expert_load_heatmap(self.experts.load_LE, path, layers=self.experts.layers, title=self.subject)


class Evaluation(Configurable):
    """Scores texts and dataset splits with a model."""

    @configclass
    class Config(cfg.Config):
        split: str = "validation"
        """The split of the dataset that is scored."""
        max_tokens: int = 100_000
        """Tokens scored per source, in windows spread evenly over the split; 0 = all of them."""
        context: int = 0
        """Tokens the model sees at once; 0 = its max_seq_len."""
        stride: int = 0
        """Tokens by which a window moves on; 0 = half the context, so that every token beyond the first window has at
        least half a context before it."""
        batch_size: int = 8
        """Windows per forward pass."""

        def __post_init__(self) -> None:
            if self.batch_size < 1:
                raise ConfigError(f"batch_size must be at least 1 window, got {self.batch_size}")
            for name in ("max_tokens", "context", "stride"):
                if getattr(self, name) < 0:
                    raise ConfigError(f"{name} must be 0 (the default) or a positive count, got {getattr(self, name)}")
            if self.context and self.stride > self.context:
                raise ConfigError(
                    f"stride must not exceed context ({self.context}), or tokens would be skipped; got {self.stride}"
                )

    config: Config

    def __init__(self, config: Config) -> None:
        self.config = config

    @classmethod
    def of(cls, loaded: LoadedModel, **changes: Any) -> Evaluation:
        """With the settings that the run recorded, and `changes` to them (None is no change)."""
        config = cfg.load(cls.Config, loaded.tree.get("evaluation", {}), "evaluation")
        return cls(config.override({name: value for name, value in changes.items() if value is not None}))

    def text(self, loaded: LoadedModel, text: str, name: str = "text") -> Report:
        """Score every token of a text but the first, which nothing precedes.

        Raises:
            ConfigError: a text of fewer than two tokens, or a context the model does not have.
        """
        tokens = np.asarray(loaded.tokenizer.encode(text), dtype=np.int64)
        if len(tokens) < 2:
            raise ConfigError(f"{name} has {len(tokens)} token(s), and scoring needs at least 2; give a longer text")
        source = _Source(name, 1.0, len(tokens), lambda start, stop: tokens[start:stop])
        return self._report(loaded, [source], f"Text {name!r}", unigram=None, max_tokens=0)

    def dataset(self, loaded: LoadedModel, dataset: Dataset) -> Report:
        """Score a split of a dataset, each source of a merged one by itself (those of weight 0 are left out).

        Raises:
            DataError: a source without two tokens in the split, or prepared with another tokenizer than the model's.
        """
        split = self.config.split
        sources = []
        for name, store, weight in zip(dataset.names, dataset.stores, dataset.weights, strict=True):
            if not weight:
                continue
            if store.manifest["tokenizer"]["fingerprint"] != loaded.tokenizer.fingerprint:
                raise DataError(
                    f"dataset {name!r} was prepared with a vocabulary of {store.manifest['tokenizer']['n_vocab']:,} "
                    f"ids and the model reads {loaded.tokenizer.n_vocab:,}; prepare the files again with "
                    + _vocab_flag(loaded)
                )
            tokens = store.num_tokens(split)
            if tokens < 2:
                raise DataError(
                    f"the {split} split of dataset {name!r} holds {tokens} token(s), too few to score; prepare it with "
                    f"more input or a larger --validation-fraction"
                )
            sources.append(_Source(name, float(weight), tokens, _reader(store, split)))
        floor = unigram_entropy(dataset, held_out=split)
        subject = f"{split} split of {str(dataset.path)!r}"
        return self._report(loaded, sources, subject, unigram=floor, max_tokens=self.config.max_tokens)

    def _report(
        self,
        loaded: LoadedModel,
        sources: Sequence[_Source],
        subject: str,
        unigram: UnigramEntropy | None,
        max_tokens: int,
    ) -> Report:
        context, stride = self._window(loaded)
        lengths_V = byte_lengths(loaded.tokenizer)
        statistics = make_statistics(loaded)

        def observe(routing: Sequence[Any], scored: Tensor) -> None:
            if statistics is not None:
                statistics.update([_Scored(layer.ids_TK[scored], layer.probs_TE[scored]) for layer in routing])

        results = []
        for source in sources:
            score = score_windows(
                loaded.model,
                source.read,
                spread(Windows(source.tokens, context, stride), max_tokens),
                byte_lengths_V=lengths_V,
                batch_size=self.config.batch_size,
                device=loaded.device,
                observe=observe,
            )
            results.append(Result(name=source.name, score=score, weight=source.weight, available=source.tokens))
        experts = statistics.read() if statistics is not None else None
        return Report(
            subject=subject, results=tuple(results), experts=experts, unigram=unigram, context=context, stride=stride
        )

    def _window(self, loaded: LoadedModel) -> tuple[int, int]:
        context = self.config.context or loaded.max_seq_len
        if context > loaded.max_seq_len:
            raise ConfigError(
                f"context: the model of {str(loaded.path)!r} sees {loaded.max_seq_len:,} tokens at once, "
                f"got {context:,}; lower it"
            )
        stride = self.config.stride or max(1, context // 2)
        if stride > context:
            raise ConfigError(f"stride must not exceed the context of {context:,} tokens, got {stride:,}")
        return context, stride


class _Source(NamedTuple):
    name: str
    weight: float
    tokens: int
    read: Callable[[int, int], NDArray[np.integer]]


class _Scored(NamedTuple):
    """The routing of the scored tokens alone."""

    ids_TK: Tensor
    probs_TE: Tensor


def read_text(file_or_text: str) -> tuple[str, str]:
    """`(text, name)` of a file's content if there is such a file, else of the words themselves.

    Raises:
        DataError: a file that is not UTF-8, or a single word that looks like the path of a file that does not exist.
    """
    if os.path.isfile(file_or_text):
        try:
            return Path(file_or_text).read_text(encoding="utf-8"), file_or_text
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file_or_text!r} is not UTF-8 text (byte {error.start:,}); give a text file in UTF-8"
            ) from None
    if _LOOKS_LIKE_A_PATH.fullmatch(file_or_text):
        raise DataError(f"there is no file {file_or_text!r}; if you mean these words as a text, end them with a space")
    return file_or_text, "text"


def recorded_dataset(loaded: LoadedModel) -> Dataset:
    """The dataset that the run was trained on, where its configuration says it is.

    Raises:
        DataError: the model records none (an export), or it is not there any more.
    """
    path = loaded.tree.get("data", {}).get("path")
    if not path:
        raise DataError(f"{str(loaded.path)!r} does not record its dataset; name one with --data-cache-dir DIR")
    if not Path(path).exists():
        raise DataError(
            f"the dataset {path!r} that {str(loaded.path)!r} was trained on is not there (seen from this folder); "
            f"name it with --data-cache-dir DIR"
        )
    return open_dataset(path)


def make_statistics(loaded: LoadedModel) -> ExpertStatistics | None:
    """Counters for the model's mixture layers; None if it has none."""
    layers = mixtures(loaded.model) if loaded.config.moe is not None else []
    if not layers:
        return None
    sizes = [moe.router.num_experts for _, moe in layers]
    return ExpertStatistics([layer for layer, _ in layers], sizes, loaded.device)


def expert_table(experts: ExpertSummary) -> str:
    """Share of its layer's tokens that every expert got, MaxVio (0 = balanced) and load entropy (1 = balanced)."""
    most = max(len(load_E) for load_E in experts.load_LE)
    header = ["layer", "MaxVio", "entropy", *(f"e{expert}" for expert in range(most))]
    rows = [
        [
            *(str(layer), f"{violation:.2f}", f"{entropy:.3f}"),
            *(f"{100 * share:.1f}%" for share in load_E),
            *[""] * (most - len(load_E)),
        ]
        for layer, violation, entropy, load_E in zip(
            experts.layers, experts.balance_L, experts.load_entropy_L, experts.load_LE, strict=True
        )
    ]
    return "\n".join([f"Experts over {experts.tokens:,} tokens:", *align([header, *rows])])


def _cells(name: str, weight: float, tokens: int, cross_entropy: float, bits_per_byte: float) -> list[str]:
    bits = "-" if math.isnan(bits_per_byte) else f"{bits_per_byte:.3f}"
    return [name, f"{weight:.3f}", f"{tokens:,}", f"{cross_entropy:.4f}", f"{perplexity(cross_entropy):,.2f}", bits]


def _reader(store: Any, split: str) -> Callable[[int, int], NDArray[np.integer]]:
    return lambda start, stop: store.read(split, start, stop)


def _vocab_flag(loaded: LoadedModel) -> str:
    size = loaded.tokenizer.config.vocab_size
    return "the whole vocabulary (no --vocab-size)" if size is None else f"--vocab-size {size}"


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None
