"""Losses as functions of what the model returns.

In: the `Routing` of each mixture layer, the cross-entropy. Out: scalars.

Legend: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blues.kernels.moe_experts import count_per_expert
from blues.model.moe.routers import Routing


class Losses(NamedTuple):
    """Scalars in float32 or better; `total` is what training minimizes, the others are unweighted."""

    total: Tensor
    cross_entropy: Tensor
    """Nats per target token."""
    load_balancing: Tensor
    """1 when balanced, up to E/K when K experts do everything; mean over mixture layers, 0 without any."""
    router_z: Tensor
    """Mean over tokens and mixture layers of logsumexp(logits) squared; 0 without any."""


def load_balancing_loss(routing: Routing) -> Tensor:
    """E * sum_e f_e P_e (Switch Transformer, arXiv 2101.03961, eq. 4-6, for top-k).

    f_e is the share of the T*K assignments that expert e got, P_e its mean clean probability, so perfect balance gives
    1 for every K. The gradient flows through P_e alone.
    """
    num_experts = routing.probs_TE.shape[1]
    share_E = count_per_expert(routing.ids_TK, num_experts) / routing.ids_TK.numel()
    return num_experts * (share_E * routing.probs_TE.mean(dim=0)).sum()


def router_z_loss(routing: Routing) -> Tensor:
    """Mean squared logsumexp of the router logits (ST-MoE, arXiv 2202.08906, eq. 5): keeps logits small."""
    return routing.logits_TE.logsumexp(dim=-1).square().mean()


def combine_losses(
    cross_entropy: Tensor, routings: Sequence[Routing], *, load_balancing_weight: float, router_z_weight: float
) -> Losses:
    """The total that training minimizes and its parts."""
    if not routings:
        zero = torch.zeros_like(cross_entropy)
        return Losses(cross_entropy, cross_entropy.detach(), zero, zero)
    balance = torch.stack([load_balancing_loss(routing) for routing in routings]).mean()
    z = torch.stack([router_z_loss(routing) for routing in routings]).mean()
    total = cross_entropy + load_balancing_weight * balance + router_z_weight * z
    return Losses(total, cross_entropy.detach(), balance.detach(), z.detach())
