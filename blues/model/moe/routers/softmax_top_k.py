"""Softmax top-k.

In: tokens. Out: a `Routing` to the k most probable experts.

Legend: T tokens, D width, E experts.
"""

from __future__ import annotations

from torch import Tensor

from blues.model.context import Context
from blues.model.moe.routing import Router, Routing, choose, project


class SoftmaxTopK(Router, variant="softmax_top_k"):
    """The k most probable experts, their probabilities renormalized (Mixtral, arXiv 2401.04088).

    Also Qwen3-MoE's rule with norm_topk_prob.
    """

    def forward(self, x_TD: Tensor, context: Context) -> Routing:
        logits_TE = project(x_TD, self.weight)
        return choose(logits_TE, logits_TE, self.top_k)
