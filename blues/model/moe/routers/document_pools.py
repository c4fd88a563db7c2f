"""A pool of experts for every document.

In: tokens and the numbers of their documents. Out: a `Routing` within each document's pool so far.

Legend: B batch, T tokens (of a row; batch and time flattened in TD, TE), D width, E experts, P experts of a pool.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.context import Context
from blues.model.moe.routing import LinearRouter, Router, Routing, choose


class DocumentPools(LinearRouter, variant="document_pools"):
    """Each document keeps to a pool of experts (EMO, arXiv 2605.06663), here chosen causally: semantic experts.

    A document's pool are the experts with the highest mean router probability over its tokens; a token goes to its k
    best experts within the pool. The paper takes the mean over the whole document, which looks ahead; here it is that
    over the tokens up to and including the one that is routed, in training and evaluation alike, so generating equals
    reading. The pool settles as the document grows. `pool`: its share of all experts; it holds at least k.

    Documents are told apart by data.isolate_documents=true and lie in one piece each; otherwise a row counts as one.
    moe.load_balancing_scope=global_batch fits best: within one document the load is meant to be uneven.
    """

    @cfg.configclass
    class Config(Router.Config):
        pool: float = 0.5

        def __post_init__(self) -> None:
            if not 0 < self.pool <= 1:
                raise ConfigError(f"pool: must be a share of the experts, above 0 and at most 1, got {self.pool}")

    config: Config

    def __init__(self, config: Config, *, num_experts: int, top_k: int, **runtime: Any) -> None:
        super().__init__(config, num_experts=num_experts, top_k=top_k, **runtime)
        self.pool_size = max(top_k, round(config.pool * num_experts))

    def forward(self, x_TD: Tensor, context: Context) -> Routing:
        logits_TE = self.logits(x_TD)
        probs_BTE = logits_TE.detach().softmax(dim=-1).unflatten(0, context.tokens_BT.shape)
        # A sum orders the experts as the mean does.
        sums_TE = self.seen(probs_BTE, context).flatten(0, 1)
        pool_TP = sums_TE.topk(self.pool_size, dim=-1).indices
        outside_TE = torch.ones_like(logits_TE, dtype=torch.bool).scatter(1, pool_TP, False)
        return choose(logits_TE, logits_TE.masked_fill(outside_TE, -torch.inf), self.top_k)

    def seen(self, probs_BTE: Tensor, context: Context) -> Tensor:
        """`sum_BTE` of the probabilities of the document's tokens up to each one."""
        past = context.past
        if past is not None:
            if past.history is None:
                raise ValueError("document_pools needs a cache with a history, such as blues.inference.cache.Cache")
            return past.history.running_sum(self, probs_BTE, past.slots_BT)
        sums_BTE = probs_BTE.cumsum(dim=1)
        documents_BT = context.documents_BT
        if documents_BT is None:
            return sums_BTE
        first_BT = torch.ones_like(documents_BT, dtype=torch.bool)
        first_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
        starts_BT = torch.where(first_BT, torch.arange(documents_BT.shape[1], device=documents_BT.device), 0)
        starts_BT1 = starts_BT.cummax(dim=1).values[..., None].expand_as(sums_BTE)
        return sums_BTE - (sums_BTE - probs_BTE).gather(1, starts_BT1)
