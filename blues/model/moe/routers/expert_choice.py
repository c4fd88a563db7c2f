"""Expert choice.

In: tokens. Out: a `Routing` of each expert's best tokens.

Legend: T tokens, D width, E experts (also the number of slots), C tokens that an expert takes.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from blues.model.context import Context
from blues.model.moe.routers.cutoffs import CutoffRouter
from blues.model.moe.routing import Routing, slots


class ExpertChoice(CutoffRouter, variant="expert_choice"):
    """Each expert takes its top k/E of the tokens (Zhou et al. 2022, arXiv 2202.09368). NOT causal in training.

    A token's probabilities are a softmax over experts; each expert takes the k*T/E tokens of the batch with the highest
    probability for it, and that probability is the weight. The load is even by construction. But whether a token is
    taken depends on later tokens of its sequence and on other sequences, so training can leak a little of the future.

    In evaluation and generation a causal rule stands in its place: a token goes to every expert for which its
    probability is at least the moving average of the expert's cut-off in training. Validation losses are of that rule.
    """

    def __init__(self, config: CutoffRouter.Config, **runtime: Any) -> None:
        super().__init__(config, **runtime)
        warnings.warn(
            "moe.router=expert_choice sees later tokens of a sequence in training and is not causal: training losses "
            "are a little too good. Evaluation and generation go by thresholds; moe.router=threshold always does",
            UserWarning,
            stacklevel=2,
        )

    def start(self) -> float:
        return 1 / self.num_experts

    def scores(self, routing: Routing) -> Tensor:
        return routing.probs_TE

    def forward(self, x_TD: Tensor, context: Context) -> Routing:
        logits_TE = self.logits(x_TD)
        probs_TE = logits_TE.softmax(dim=-1)
        if self.training:
            taken_CE = probs_TE.detach().topk(self.capacity(len(x_TD)), dim=0).indices
            chosen_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(0, taken_CE, True)
        else:
            chosen_TE = probs_TE >= self.threshold_E
        return Routing(*slots(chosen_TE, probs_TE), probs_TE, logits_TE)
