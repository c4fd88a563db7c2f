"""What the router did, in numbers: expert load, its balance, and how undecided the router is.

In: the `Routing` of each mixture-of-experts layer (blues/model/moe/routing.py), as the model's forward returns it.
Out: an `ExpertSummary` of plain floats, and the same as named metrics.

Counts stay on the routing's device and are added up there; `ExpertStatistics.read` copies them to the host once.
The routing is an output of the forward pass, so activation checkpointing (which runs a forward twice) counts once.

Layers may differ in their experts and slots: tables are as wide as the widest layer, and what lies beyond a layer's own
experts is not looked at. A slot with the id E of its layer holds no expert and is no load.

Shapes: L mixture-of-experts layers, T tokens, E experts, K slots per token, S statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class RoutingLike(Protocol):
    """The two fields of `blues.model.moe.routing.Routing` that are counted."""

    @property
    def ids_TK(self) -> Tensor: ...

    @property
    def probs_TE(self) -> Tensor: ...


def max_violation(load_LE: Tensor) -> Tensor:
    """MaxVio per layer, L values: max(load) / mean(load) - 1 (arXiv 2408.15664, section 4.1).

    0 when every expert gets the same share; E / K - 1 when K experts get every token. NaN when none gets anything.
    """
    return load_LE.amax(-1) / load_LE.mean(-1) - 1


def load_cv(load_LE: Tensor) -> Tensor:
    """Coefficient of variation per layer, L values: population standard deviation / mean; 0 when balanced, NaN when no
    expert gets anything."""
    return load_LE.std(-1, correction=0) / load_LE.mean(-1)


def load_entropy(load_LE: Tensor) -> Tensor:
    """H(load) / log E per layer, L values in [0, 1]: 1 when balanced, 0 when one expert gets everything, NaN when none
    gets anything."""
    share_LE = load_LE / load_LE.sum(-1, keepdim=True)
    return torch.special.entr(share_LE).sum(-1) / math.log(max(load_LE.shape[-1], 2))


def routing_entropy(probs_TE: Tensor) -> Tensor:
    """H(router probabilities) / log E of every token, T values in [0, 1]: 1 when the router has no preference.

    Probabilities that do not sum to 1 (sigmoid routers) are normalized first.
    """
    probs_TE = probs_TE.detach().float()
    share_TE = probs_TE / probs_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.special.entr(share_TE).sum(-1) / math.log(max(probs_TE.shape[-1], 2))


def stack_ids(routing: Sequence[RoutingLike], width: int) -> Tensor:
    """`ids_TLK` (int64) of all layers in one tensor; slots that a layer lacks hold `width`, as do ids above it.

    Args:
        width: the experts of the widest layer.
    """
    most = max(layer.ids_TK.shape[1] for layer in routing)
    padded = [F.pad(layer.ids_TK, (0, most - layer.ids_TK.shape[1]), value=width) for layer in routing]
    return torch.stack(padded, dim=1).to(torch.int64).clamp(max=width)


def sum_dtype(device: torch.device | str) -> torch.dtype:
    """float32 stops counting at 2**24; MPS has nothing wider."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


@dataclass(frozen=True, kw_only=True)
class ExpertSummary:
    """Statistics of a span of training, as host numbers. One entry per mixture-of-experts layer, in order.

    A figure that has no value, because a layer sent no token to any expert, is NaN.
    """

    layers: tuple[int, ...]
    """Index of each mixture-of-experts layer within the transformer, from 0."""
    load_LE: list[list[float]]
    """Share of the layer's routed (token, choice) pairs that each expert got; rows sum to 1; balanced is 1 / E. Layers
    may have different numbers of experts. All zeros where no token went to any expert."""
    balance_L: list[float]
    """MaxVio (`max_violation`) of the last update: over one global batch."""
    interval_balance_L: list[float]
    """MaxVio over all updates since the last reset (MaxVio_global of the paper, for a span of training): imbalances
    of single batches that cancel out do not show here."""
    load_cv_L: list[float]
    load_entropy_L: list[float]
    routing_entropy_L: list[float]
    """Mean over tokens of `routing_entropy`."""
    experts_per_token_L: list[float]
    """Mean over tokens of the experts that a token went to: top_k, or less where slots stay empty."""
    tokens: int
    """Tokens that each layer routed in the last update."""

    @property
    def balance(self) -> float:
        """Mean MaxVio over layers."""
        return _mean(self.balance_L)

    def metrics(self) -> dict[str, float]:
        """`experts/balance`, `experts/load_cv`, ... over layers, and `experts/layer_01/load_03`, ... per expert."""
        named = {
            "experts/balance": self.balance,
            "experts/interval_balance": _mean(self.interval_balance_L),
            "experts/load_cv": _mean(self.load_cv_L),
            "experts/load_entropy": _mean(self.load_entropy_L),
            "experts/routing_entropy": _mean(self.routing_entropy_L),
            "experts/experts_per_token": _mean(self.experts_per_token_L),
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
        num_experts: E of every layer, or one number for all.
        device: where the counts live; the device of the routings.

    `counts` is one (2, L, S) tensor, the last update and all since the reset; S = widest E + 3: choices of each expert,
    empty slots, tokens, summed routing entropy. Ranks combine their statistics by summing it, e.g.
    `torch.distributed.all_reduce(statistics.counts)` before `read`. Who does not call `next_update` has one update.
    """

    def __init__(
        self, layers: Sequence[int], num_experts: int | Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        self.layers = tuple(layers)
        sizes = [num_experts] * len(self.layers) if isinstance(num_experts, int) else num_experts
        self.num_experts = tuple(sizes)
        if not self.layers or len(self.layers) != len(self.num_experts) or min(self.num_experts) < 1:
            raise ValueError(
                f"need at least one layer, and one expert in each: {len(self.layers)} layers of {num_experts} experts"
            )
        self.width = max(self.num_experts)
        self.counts = torch.zeros(2, len(self.layers), self.width + 3, dtype=sum_dtype(device), device=device)

    @torch.no_grad()
    def update(self, routing: Sequence[RoutingLike]) -> None:
        """Add one forward pass: a routing per layer. Does not wait for the device."""
        if len(routing) != len(self.layers):
            raise ValueError(f"expected the routing of {len(self.layers)} layers, got {len(routing)}")
        ids_TLK = stack_ids(routing, self.width)
        ids_LN = ids_TLK.transpose(0, 1).flatten(1)
        sums_LS = self.counts.new_zeros(self.counts.shape[1:])
        # a scatter instead of bincount, which waits for the device to size its output
        sums_LS.scatter_add_(1, ids_LN, sums_LS.new_ones(()).expand_as(ids_LN))
        sums_LS[:, -2] = len(ids_TLK)
        sums_LS[:, -1] = torch.stack([routing_entropy(layer.probs_TE).sum(dtype=sums_LS.dtype) for layer in routing])
        self.counts += sums_LS

    def next_update(self) -> None:
        """Another update begins; the sums since the reset go on."""
        self.counts[0].zero_()

    def read(self) -> ExpertSummary:
        """The statistics of the last update; one copy from the device.

        Raises:
            ValueError: nothing was added since the last reset or update.
        """
        counts = self.counts.cpu().double()
        tokens_L, entropy_L = counts[0, :, -2], counts[0, :, -1]
        if not bool((tokens_L > 0).all()):
            raise ValueError("no tokens were routed since the last reset, so there is no expert load to report")
        choices = [
            (counts[0, layer, :experts], counts[1, layer, :experts]) for layer, experts in enumerate(self.num_experts)
        ]
        loads = [last_E / last_E.sum().clamp(min=1) for last_E, _ in choices]
        return ExpertSummary(
            layers=self.layers,
            load_LE=[load_E.tolist() for load_E in loads],
            balance_L=[float(max_violation(load_E)) for load_E in loads],
            interval_balance_L=[float(max_violation(all_E)) for _, all_E in choices],
            load_cv_L=[float(load_cv(load_E)) for load_E in loads],
            load_entropy_L=[float(load_entropy(load_E)) for load_E in loads],
            routing_entropy_L=(entropy_L / tokens_L).tolist(),
            experts_per_token_L=[
                float(last_E.sum() / tokens) for (last_E, _), tokens in zip(choices, tokens_L.tolist(), strict=True)
            ],
            tokens=int(tokens_L[0].item()),
        )

    def reset(self) -> None:
        """Start a new span."""
        self.counts.zero_()


def _mean(values: Sequence[float]) -> float:
    """Of those that have a value."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
