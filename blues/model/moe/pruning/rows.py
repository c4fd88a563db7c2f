"""Routers with fewer experts, and experts merged into one: what actions do with tensors.

In: a router or experts, and which experts stay. Out: new tensors.

Legend: E experts, D width, F expert width, G = 2F.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from blues.errors import ConfigError
from blues.model.moe.routing import Router

EXPERT_DIMENSION = {
    "weight": 0,
    "noise_weight": 0,
    "bias_E": 0,
    "threshold_E": 0,
    "off_E": 0,
    "bias_LE": 1,
    "strength": None,
    "updates": None,
}
"""Tensors of routers: the dimension that counts experts; None for those that know of none."""

REFUSED = {
    "hash": "it deals tokens to experts by number, so that other numbers deal all tokens anew",
    "group_limited": "its groups are runs of neighbours, so that other numbers make other groups",
    "document_pools": "its pools are shares of all experts, so that fewer experts make smaller pools",
}
"""Routers whose experts cannot be taken away one by one."""


def check_router(router: Router) -> None:
    """
    Raises:
        ConfigError: experts of this router cannot be removed (why not).
    """
    variant = type(router.config)._variant or type(router).__name__
    if variant in REFUSED:
        raise ConfigError(
            f"model.moe.router={variant}: experts cannot be removed, {REFUSED[variant]}; use --action mean_output or "
            "merge, which leave the router as it is"
        )
    for name in router.state_dict():
        if name not in EXPERT_DIMENSION:
            raise ConfigError(
                f"model.moe.router={variant}: its tensor {name!r} is not known to pruning, so experts cannot be removed"
            )


def router_rows(name: str, tensor: Tensor, kept: Sequence[int], num_experts: int) -> Tensor:
    """The part of a router's tensor that belongs to `kept`, and to whatever it knows beyond `num_experts`."""
    dimension = EXPERT_DIMENSION[name]
    if dimension is None:
        return tensor
    rows = [*kept, *range(num_experts, tensor.shape[dimension])]
    return tensor.index_select(dimension, torch.tensor(rows, device=tensor.device))


def with_experts(router: Router, kept: Sequence[int], num_experts: int) -> Router:
    """A copy of `router` that knows the experts `kept` alone, numbered anew, in evaluation mode.

    Raises:
        ConfigError: see `check_router`.
    """
    check_router(router)
    fewer = copy.copy(router)
    fewer._parameters, fewer._buffers = dict(router._parameters), dict(router._buffers)
    fewer.num_experts = len(kept) + router.num_experts - num_experts
    for name, parameter in router.named_parameters():
        rows = router_rows(name, parameter.detach(), kept, num_experts)
        fewer._parameters[name] = torch.nn.Parameter(rows, requires_grad=False)
    for name, buffer in router.named_buffers():
        fewer._buffers[name] = router_rows(name, buffer, kept, num_experts)
    return fewer.eval()


def merge_experts(
    gate_up_EGD: Tensor, down_EDF: Tensor, members: Sequence[int], shares: Sequence[float], *, align: bool
) -> tuple[Tensor, Tensor]:
    """`gate_up_GD, down_DF`: the weighted mean of these experts; a single one stays as it is, bit for bit.

    `align`: the hidden neurons of the others are first put into the order in which they match those of `members[0]`
    best, since an expert computes the same whatever their order is (weight matching, arXiv 2209.04836, as M-SMoE does).
    """
    first = members[0]
    if len(members) == 1:
        return gate_up_EGD[first], down_EDF[first]
    gate_up_GD, down_DF = torch.zeros_like(gate_up_EGD[0]).double(), torch.zeros_like(down_EDF[0]).double()
    for member, share in zip(members, shares, strict=True):
        one_GD, two_DF = gate_up_EGD[member].double(), down_EDF[member].double()
        if align and member != first:
            order_F = matching(gate_up_EGD[first].double(), down_EDF[first].double(), one_GD, two_DF)
            one_GD = torch.cat([half_FD[order_F] for half_FD in one_GD.chunk(2)])
            two_DF = two_DF[:, order_F]
        gate_up_GD += share * one_GD
        down_DF += share * two_DF
    return gate_up_GD.to(gate_up_EGD.dtype), down_DF.to(down_EDF.dtype)


def matching(gate_up_GD: Tensor, down_DF: Tensor, other_GD: Tensor, other_DF: Tensor) -> Tensor:
    """`order_F`: which neuron of the other expert fits each of the first one's, so that the products of their weights
    have the largest sum (exact: Hungarian method)."""
    from scipy.optimize import linear_sum_assignment

    likeness_FF = down_DF.T @ other_DF
    for half_FD, other_FD in zip(gate_up_GD.chunk(2), other_GD.chunk(2), strict=True):
        likeness_FF = likeness_FF + half_FD @ other_FD.T
    _, order_F = linear_sum_assignment(likeness_FF.cpu().numpy(), maximize=True)
    return torch.from_numpy(np.asarray(order_F)).to(gate_up_GD.device)
