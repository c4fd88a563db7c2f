"""The family `long_context`: what a model makes of a text as long as its context.

In: a `LoadedModel` and held-out sequences. Out: a result with a table to read, a tree for JSON, and metrics.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

from blues import config as cfg
from blues.data.mixture.batches import Mixture
from blues.errors import ConfigError, DataError
from blues.inference.loading import LoadedModel


class Result(Protocol):
    """What a measurement found."""

    def table(self) -> str:
        """As text for a terminal."""

    def to_tree(self) -> dict[str, Any]:
        """Plain values for JSON."""

    def metrics(self) -> dict[str, float]:
        """For a tracker, by name."""


class LongContext(cfg.Configurable, family="long_context"):
    """One measurement."""

    @cfg.configclass
    class Config(cfg.Config):
        """samples: texts. batch_size: texts per forward pass. seed: of what is drawn."""

        samples: int = 64
        batch_size: int = 8
        seed: int = 0

        def __post_init__(self) -> None:
            for name in ("samples", "batch_size"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")

    config: Config

    def __init__(self, config: Config) -> None:
        self.config = config

    @abc.abstractmethod
    def run(self, loaded: LoadedModel, data: Mixture) -> Result:
        """Measure. `data`: sequences as long as the model's context (`held_out`)."""


def held_out(loaded: LoadedModel, path: str | None = None, *, length: int = 0, split: str = "validation") -> Mixture:
    """Sequences of `length` tokens (0: the model's context) of a dataset's split; None is the run's own dataset.

    Raises:
        ConfigError: more tokens than the model sees at once.
        DataError: no dataset, one that is not there or was prepared with another tokenizer, or too small.
    """
    recorded = loaded.tree.get("data", {})
    path = path or recorded.get("path")
    if not path:
        raise DataError(f"{str(loaded.path)!r} does not record its dataset; name one with --data-cache-dir DIR")
    if length > loaded.max_seq_len:
        raise ConfigError(
            f"context: the model of {str(loaded.path)!r} sees {loaded.max_seq_len:,} tokens at once, got {length:,}; "
            "`blues extend` makes it see more"
        )
    config = Mixture.Config(
        path=path,
        sequence_length=length or loaded.max_seq_len,
        tokenizer=loaded.tokenizer.config,
        isolate_documents=bool(recorded.get("isolate_documents", False)),
    )
    return config.build(split=split)


def measure(
    loaded: LoadedModel,
    names: Sequence[str],
    path: str | None = None,
    *,
    length: int = 0,
    split: str = "validation",
    **settings: Any,
) -> dict[str, Result]:
    """The results of members of the family by name; `settings` (None: the default) are common to all of them.

    Raises:
        ConfigError: an unknown name (with the nearest); and as `held_out`.
    """
    for module in ("positions", "retrieval"):  # they register themselves
        import_module(f"blues.evaluation.{module}")
    data = held_out(loaded, path, length=length, split=split)
    results = {}
    for name in names:
        if name not in LongContext.variants:
            raise ConfigError(f"unknown long-context measurement {name!r}.{cfg.nearest(name, LongContext.variants)}")
        config = LongContext.variants[name].Config()
        config = config.override({key: value for key, value in settings.items() if value is not None})
        results[name] = config.build().run(loaded, data)
    return results
