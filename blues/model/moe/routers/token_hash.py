"""Experts fixed by the token's id.

In: token ids. Out: a `Routing` that no training changes.

Legend: T tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blues import config as cfg
from blues.model.context import Context
from blues.model.moe.routing import Router, Routing

CLOSED = -30.0
"""Logit of an expert that is not chosen: e**-30 is nothing beside 1, and still a number to compute with."""


class TokenHash(Router, variant="hash"):
    """A balanced random hash of the token id, no parameters: a baseline (Hash Layers, arXiv 2106.04426).

    Ids are cut into runs of E neighbours, and every run is dealt out to the E experts from a place drawn by `seed`. Ids
    of byte pair encodings come about in the order of their frequency, so every expert gets as many ids of every
    frequency (the paper's balanced assignment, without counting the corpus). The k experts of an id are distinct and
    have the weight 1/k; all layers hash alike, as in the paper. Its balance and z losses are constants.
    """

    @cfg.configclass
    class Config(Router.Config):
        seed: int = 0

    config: Config

    def forward(self, x_TD: Tensor, context: Context) -> Routing:
        ids_TK = self.experts_of(context.tokens_BT.flatten())
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        logits_TE = torch.full((len(x_TD), self.num_experts), CLOSED, dtype=dtype, device=x_TD.device)
        logits_TE = logits_TE.scatter(1, ids_TK, -math.log(self.top_k))
        weights_TK = torch.full_like(ids_TK, 1, dtype=dtype) / self.top_k
        return Routing(weights_TK, ids_TK, logits_TE.softmax(dim=-1), logits_TE)

    def experts_of(self, tokens_T: Tensor) -> Tensor:
        """`ids_TK` of these token ids."""
        runs_T, places_T = tokens_T // self.num_experts, tokens_T % self.num_experts
        first_T1 = ((places_T + scrambled(runs_T, self.config.seed)) % self.num_experts)[:, None]
        if self.top_k == 1:
            return first_T1
        # The others lie at distinct distances from 1 to E - 1; those of a run's ids are the same, so balance stays.
        others_K = torch.arange(self.top_k - 1, device=tokens_T.device)
        others_TK = (scrambled(runs_T, self.config.seed + 1)[:, None] + others_K) % (self.num_experts - 1) + 1
        return torch.cat([first_T1, (first_T1 + others_TK) % self.num_experts], dim=1)


def scrambled(numbers_T: Tensor, seed: int) -> Tensor:
    """Numbers from 0 to 2**31 - 1 that look random, the same on every device: multiplicative hashing in int64."""
    mixed_T = (numbers_T + 1) * 0x9E3779B97F4A7C1 + seed * 0x2545F4914F6CDD1D % 2**62
    mixed_T = (mixed_T ^ (mixed_T >> 29)) * 0xBF58476D1CE4E5B
    return (mixed_T ^ (mixed_T >> 32)) & 0x7FFFFFFF
