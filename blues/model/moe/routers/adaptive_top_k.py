"""As many experts as a token's uncertainty asks for.

In: tokens. Out: a `Routing` of each token to its most probable experts, of varying number.

Legend: T tokens, D width, E experts, K slots.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.context import Context
from blues.model.moe.routing import LinearRouter, Router, Routing


class AdaptiveTopK(LinearRouter, variant="adaptive_top_k"):
    """The fewest experts whose probabilities reach p together: top-p routing (arXiv 2403.07652).

    At least one expert and at most `max_experts` (null: all). Weights are the probabilities themselves. Undecided
    routers would choose many experts, so `entropy_weight` times the mean entropy of the probabilities is added to the
    loss (the paper's 1e-4; 0 for none). moe.top_k is only what the number of active parameters is reckoned with.
    """

    empty_slots = True

    @cfg.configclass
    class Config(Router.Config):
        p: float = 0.4
        max_experts: int | None = None
        entropy_weight: float = 1e-4

        def __post_init__(self) -> None:
            if not 0 < self.p <= 1:
                raise ConfigError(f"p: must be above 0 and at most 1, got {self.p}")
            if self.max_experts is not None and self.max_experts < 1:
                raise ConfigError(f"max_experts: must be at least 1, got {self.max_experts}")
            if self.entropy_weight < 0:
                raise ConfigError(f"entropy_weight: must not be negative, got {self.entropy_weight}")

    config: Config

    def __init__(self, config: Config, *, num_experts: int, **runtime: Any) -> None:
        super().__init__(config, num_experts=num_experts, **runtime)
        self.slots = min(config.max_experts or num_experts, num_experts)

    def forward(self, x_TD: Tensor, context: Context) -> Routing:
        logits_TE = self.logits(x_TD)
        probs_TE = logits_TE.softmax(dim=-1)
        probs_TK, ids_TK = probs_TE.topk(self.slots, dim=-1)
        before_TK = F.pad(probs_TK.detach().cumsum(dim=-1)[:, :-1], (1, 0))
        # The first expert is always taken: nothing comes before it, and p is above 0.
        enough_TK = before_TK >= self.config.p
        penalty = None
        if self.config.entropy_weight:
            entropy_T = torch.special.entr(probs_TE).sum(dim=-1)
            penalty = self.config.entropy_weight * entropy_T.mean()
        return Routing(
            probs_TK.masked_fill(enough_TK, 0),
            ids_TK.masked_fill(enough_TK, self.num_experts),
            probs_TE,
            logits_TE,
            penalty,
        )
