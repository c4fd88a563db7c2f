"""Routers of 16 channels and 6 experts, and tokens for them."""

from __future__ import annotations

import torch

from blues.model.context import Context
from blues.model.moe.routing import Router

VARIANTS = sorted(Router.variants)


def make(config, num_experts=6, top_k=2, seed=0, std=0.5):
    generator = torch.Generator().manual_seed(seed)
    return config.build(dim=16, num_experts=num_experts, top_k=top_k, std=std, generator=generator)


def tokens(n=64, dtype=torch.float32, seed=3):
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def context(n=64, rows=1, **rest):
    ids = torch.randint(1000, (rows, n // rows), generator=torch.Generator().manual_seed(n))
    return Context(ids, **rest)


def experts_of(routing):
    """The set of experts of each token."""
    num_experts = routing.probs_TE.shape[1]
    return [{expert for expert in row if expert < num_experts} for row in routing.ids_TK.tolist()]


def weights_of(routing):
    """`weights_TE`: what each expert's output is multiplied by."""
    T, E = routing.probs_TE.shape
    dense = routing.weights_TK.new_zeros(T, E + 1)
    return dense.scatter_add(1, routing.ids_TK, routing.weights_TK)[:, :E]
