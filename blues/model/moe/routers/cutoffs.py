"""Routers in which every expert has a threshold that lets in its share of the tokens.

In: each expert's scores of many tokens. Out: a moving average of each expert's cut-off, the score above which its share
of the tokens lies.

An expert's share is k of E tokens. The cut-off of an update is the mean of those of its micro batches on all workers:
of equally many tokens each, but not exactly the quantile of all tokens together.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.moe.routing import LinearRouter, Router, Routing


class CutoffRouter(LinearRouter):
    """The moving average and how it adapts; members say what is compared with it."""

    balanced_by = "itself"
    empty_slots = True

    @cfg.configclass
    class Config(Router.Config):
        """decay: of the moving average, per update; the first update sets it."""

        decay: float = 0.99

        def __post_init__(self) -> None:
            if not 0 <= self.decay < 1:
                raise ConfigError(f"decay: must be from 0 to below 1, got {self.decay}")

    config: Config
    threshold_E: Tensor
    updates: Tensor

    def __init__(self, config: Config, *, num_experts: int, **runtime: Any) -> None:
        super().__init__(config, num_experts=num_experts, **runtime)
        self.register_buffer("threshold_E", torch.full((num_experts,), self.start()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @abc.abstractmethod
    def start(self) -> float:
        """The threshold before the first update."""

    @abc.abstractmethod
    def scores(self, routing: Routing) -> Tensor:
        """`scores_TE` that are compared with the threshold."""

    def capacity(self, tokens: int) -> int:
        """An expert's share of `tokens`, at least 1."""
        return max(1, tokens * self.top_k // self.num_experts)

    def statistics(self, routing: Routing) -> Tensor:
        """This batch's cut-off of each expert, and 1."""
        scores_TE = self.scores(routing)
        cutoff_E = scores_TE.topk(self.capacity(len(scores_TE)), dim=0).values[-1]
        return torch.cat([cutoff_E, cutoff_E.new_ones(1)]).float()

    def adapt(self, sums_S: Tensor) -> None:
        cutoff_E = sums_S[:-1] / sums_S[-1]
        kept = torch.where(self.updates == 0, 0.0, self.config.decay)
        self.threshold_E.copy_(kept * self.threshold_E + (1 - kept) * cutoff_E)
        self.updates += 1
