"""A curriculum of growing context: the first updates read shorter sequences, as many tokens as the later ones.

In: stages, and the batches of whole sequences. Out: the same tokens in the same order, each sequence cut into shorter
rows that know nothing of one another: positions and attention start anew in each.

Short sequences first make training steadier and cheaper (sequence length warm-up, arXiv 2108.06084), and a growing
length is no worse than the full one throughout (GrowLength, arXiv 2310.00576). Since the cut comes after the reading,
the order of the data does not know of it: batches stay a pure function of (seed, step), every update has the same
tokens and targets, and after the last stage training is the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence

from blues import config as cfg
from blues.data.mixture.batches import Batch
from blues.errors import ConfigError


@cfg.configclass
class Stage(cfg.Config):
    """Updates before `until`, a share of all steps (0 to 1), read rows of `length` tokens."""

    until: float
    length: int

    def __post_init__(self) -> None:
        if not 0 < self.until < 1:
            raise ConfigError(
                f"until: {self.until} must be a share of all steps, above 0 and below 1: after the last stage come "
                "whole sequences"
            )
        if self.length < 1:
            raise ConfigError(f"length: {self.length} must be at least 1 token")


def check_stages(stages: Sequence[Stage]) -> None:
    """Raises ConfigError unless both shares and lengths rise."""
    for number, (stage, following) in enumerate(zip(stages, stages[1:], strict=False), start=1):
        for name in ("until", "length"):
            before, after = getattr(stage, name), getattr(following, name)
            if after <= before:
                raise ConfigError(f"context[{number}].{name}: {after} must be above that of the stage before, {before}")


def check_lengths(stages: Sequence[Stage], sequence_length: int) -> None:
    """Raises ConfigError unless sequences of `sequence_length` tokens can be cut into rows of every stage."""
    for number, stage in enumerate(stages):
        if sequence_length % stage.length or stage.length >= sequence_length:
            fitting = [length for length in range(1, sequence_length) if sequence_length % length == 0]
            best = min(fitting, key=lambda length: abs(length - stage.length), default=1)
            raise ConfigError(
                f"training.context[{number}].length: {stage.length} must be shorter than data.sequence_length="
                f"{sequence_length} and divide it; nearest that does: {best}"
            )


class Curriculum:
    """The length of the rows at each update."""

    def __init__(self, stages: Sequence[Stage], *, steps: int, sequence_length: int) -> None:
        """steps: updates of the whole run.

        Raises:
            ConfigError: a length that does not divide `sequence_length`.
        """
        check_lengths(stages, sequence_length)
        self.stages, self.steps, self.sequence_length = tuple(stages), steps, sequence_length

    def length_at(self, update: int) -> int:
        """Tokens of a row at update `update` (from 0)."""
        lengths = (stage.length for stage in self.stages if update < stage.until * self.steps)
        return next(lengths, self.sequence_length)

    def cut(self, batch: Batch, update: int) -> Batch:
        """The batch as update `update` reads it."""
        length = self.length_at(update)
        return batch if length == self.sequence_length else batch.cut(length)
