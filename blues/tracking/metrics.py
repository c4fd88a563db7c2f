"""What the router did, in numbers: expert load, its balance, and how undecided the router is.

In: the `Routing` of each mixture-of-experts layer (blues/model/moe/routing.py), as the model's forward returns it.
Out: an `ExpertSummary` of plain floats, and the same as named metrics.

Counts stay on the routing's device and are added up there; `ExpertStatistics.read` copies them to the host once.
The routing is an output of the forward pass, so activation checkpointing (which runs a forward twice) counts once.

Shapes: L mixture-of-experts layers, T tokens, E experts, K experts chosen per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class RoutingLike(Protocol):
    """The two fields of `blues.model.moe.routing.Routing` that are counted."""

    @property
    def ids_TK(self) -> Tensor: ...

    @property
    def probs_TE(self) -> Tensor: ...


def max_violation(load_LE: Tensor) -> Tensor:
    """MaxVio per layer, L values: max(load) / mean(load) - 1 (arXiv 2408.15664, section 4.1).

    0 when every expert gets the same share; E / K - 1 when K experts get every token.
    """
    return load_LE.amax(-1) / load_LE.mean(-1) - 1


def load_cv(load_LE: Tensor) -> Tensor:
    """Coefficient of variation per layer, L values: population standard deviation / mean; 0 when balanced."""
    return load_LE.std(-1, correction=0) / load_LE.mean(-1)


def load_entropy(load_LE: Tensor) -> Tensor:
    """H(load) / log E per layer, L values in [0, 1]: 1 when balanced, 0 when one expert gets everything."""
    share_LE = load_LE / load_LE.sum(-1, keepdim=True)
    return torch.special.entr(share_LE).sum(-1) / math.log(max(load_LE.shape[-1], 2))


def routing_entropy(probs_TE: Tensor) -> Tensor:
    """H(router probabilities) / log E of every token, T values in [0, 1]: 1 when the router has no preference.

    Probabilities that do not sum to 1 (sigmoid routers) are normalized first.
    """
    probs_TE = probs_TE.detach().float()
    share_TE = probs_TE / probs_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.special.entr(share_TE).sum(-1) / math.log(max(probs_TE.shape[-1], 2))


@dataclass(frozen=True, kw_only=True)
class ExpertSummary:
    """Statistics of a span of training, as host numbers. One entry per mixture-of-experts layer, in order."""

    layers: tuple[int, ...]
    """Index of each mixture-of-experts layer within the transformer, from 0."""
    load_LE: list[list[float]]
    """Share of the layer's routed (token, choice) pairs that each expert got; rows sum to 1; balanced is 1 / E."""
    balance_L: list[float]
    """MaxVio (`max_violation`)."""
    load_cv_L: list[float]
    load_entropy_L: list[float]
    routing_entropy_L: list[float]
    """Mean over tokens of `routing_entropy`."""
    tokens: int
    """Tokens that each layer routed."""

    @property
    def balance(self) -> float:
        """Mean MaxVio over layers."""
        return _mean(self.balance_L)

    def metrics(self) -> dict[str, float]:
        """`experts/balance`, `experts/load_cv`, ... over layers, and `experts/layer_01/load_03`, ... per expert."""
        named = {
            "experts/balance": self.balance,
            "experts/load_cv": _mean(self.load_cv_L),
            "experts/load_entropy": _mean(self.load_entropy_L),
            "experts/routing_entropy": _mean(self.routing_entropy_L),
        }
        for layer, balance, load_E in zip(self.layers, self.balance_L, self.load_LE, strict=True):
            named[f"experts/layer_{layer:02d}/balance"] = balance
            for expert, share in enumerate(load_E):
                named[load_metric(layer, expert)] = share
        return named


def load_metric(layer: int, expert: int) -> str:
    """Name of the metric that holds an expert's share of its layer's tokens."""
    return f"experts/layer_{layer:02d}/load_{expert:02d}"


class ExpertStatistics:
    """Adds up `Routing`s until they are read.

    Args:
        layers: index of each mixture-of-experts layer within the transformer, in the order of the routings.
        num_experts: E, the same in every layer.
        device: where the counts live; the device of the routings.

    `counts` is one (L, E + 2) float64 tensor (E choices, tokens, summed routing entropy). Ranks combine their
    statistics by summing it, e.g. `torch.distributed.all_reduce(statistics.counts)` before `read`.
    """

    def __init__(self, layers: Sequence[int], num_experts: int, device: torch.device | str = "cpu") -> None:
        if not layers or num_experts < 1:
            raise ValueError(f"need at least one layer and one expert, got {len(layers)} and {num_experts}")
        self.layers = tuple(layers)
        self.num_experts = num_experts
        # float32 stops counting at 2**24 choices; MPS has nothing wider
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self.counts = torch.zeros(len(self.layers), num_experts + 2, dtype=dtype, device=device)

    @torch.no_grad()
    def update(self, routing: Sequence[RoutingLike]) -> None:
        """Add one forward pass: a routing per layer. Does not wait for the device."""
        if len(routing) != len(self.layers):
            raise ValueError(f"expected the routing of {len(self.layers)} layers, got {len(routing)}")
        rows = []
        for layer in routing:
            # one scatter per layer instead of bincount, which waits for the device to size its output
            ids = layer.ids_TK.reshape(-1).to(torch.int64)
            row = self.counts.new_zeros(self.num_experts + 2)
            row.scatter_add_(0, ids, row.new_ones(()).expand_as(ids))
            row[-2] = layer.ids_TK.shape[0]
            row[-1] = routing_entropy(layer.probs_TE).sum(dtype=row.dtype)
            rows.append(row)
        self.counts += torch.stack(rows)

    def read(self) -> ExpertSummary:
        """The statistics since the last `reset`; one copy from the device.

        Raises:
            ValueError: nothing was added since the last reset.
        """
        counts = self.counts.cpu().double()
        choices_LE, tokens_L, entropy_L = counts[:, :-2], counts[:, -2], counts[:, -1]
        if not bool((tokens_L > 0).all()):
            raise ValueError("no tokens were routed since the last reset, so there is no expert load to report")
        load_LE = choices_LE / choices_LE.sum(-1, keepdim=True)
        return ExpertSummary(
            layers=self.layers,
            load_LE=load_LE.tolist(),
            balance_L=max_violation(load_LE).tolist(),
            load_cv_L=load_cv(load_LE).tolist(),
            load_entropy_L=load_entropy(load_LE).tolist(),
            routing_entropy_L=(entropy_L / tokens_L).tolist(),
            tokens=int(tokens_L[0].item()),
        )

    def reset(self) -> None:
        """Start a new span."""
        self.counts.zero_()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
