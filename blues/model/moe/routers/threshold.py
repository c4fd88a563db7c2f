"""Expert threshold routing.

In: tokens. Out: a `Routing` of each token to the experts whose threshold it passes, of varying number.

Legend: T tokens, D width, E experts (also the number of slots).
"""

from __future__ import annotations

from torch import Tensor

from blues.model.context import Context
from blues.model.moe.routers.cutoffs import CutoffRouter
from blues.model.moe.routing import Routing, slots


class ExpertThreshold(CutoffRouter, variant="threshold"):
    """Expert threshold routing with moving-average cut-offs (arXiv 2603.11535): balanced and causal.

    A token goes to every expert for which its logit is above the expert's threshold, with the sigmoid of the logit as
    weight: k experts in the mean, none or many for some. The threshold follows the logit above which k of E tokens lie,
    in training and in evaluation alike; no token's experts depend on another token of its batch. Until the first update
    the threshold is 0.
    """

    is_softmax = False

    def start(self) -> float:
        return 0.0

    def scores(self, routing: Routing) -> Tensor:
        return routing.logits_TE

    def forward(self, x_TD: Tensor, context: Context) -> Routing:
        logits_TE = self.logits(x_TD)
        weights_TE, ids_TE = slots(logits_TE > self.threshold_E, logits_TE.sigmoid())
        return Routing(weights_TE, ids_TE, logits_TE.softmax(dim=-1), logits_TE)
