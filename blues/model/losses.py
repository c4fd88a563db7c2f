"""Losses as functions of what the model returns.

In: the `Routing` of each mixture layer, the cross-entropy. Out: scalars.

Load balancing has a scope: the tokens among which the load is to be even. All of them have the same scale (1 when
balanced) and a gradient through the mean probabilities alone; over the micro batches and workers of an update the
trainer takes the mean of their losses.

- `micro_batch`: the tokens of one forward. The mean over an update is not the loss of one large batch, because the
  product of two means is not linear; the smaller the micro batch, the stricter it is.
- `sequence`: each row of the batch by itself (DeepSeek-V2, arXiv 2405.04434, sec. 2.1.3), then the mean over rows.
  Exact: loss and gradient of an update do not depend on how its rows are spread over micro batches and workers.
- `global_batch`: the load is counted over all workers and over the micro batches of the update so far (arXiv
  2501.11873); the probabilities are those of this forward. Exact over workers: with one micro batch per update, loss
  and gradient are those of one large batch. Over micro batches it is exact where their loads are equal; otherwise
  early micro batches know only the load up to them, and only the last one that of the whole update.

Legend: B rows of the batch, T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from blues.kernels.moe_experts import count_per_expert
from blues.model.attention.span import LearnedSpan
from blues.model.moe.layer import Scope
from blues.model.moe.routing import Routing


class Losses(NamedTuple):
    """Scalars in float32 or better; `total` is what training minimizes, the others are unweighted."""

    total: Tensor
    cross_entropy: Tensor
    """Nats per target token."""
    load_balancing: Tensor
    """1 when balanced, up to E/K when K experts do everything; mean over mixture layers, 0 without any."""
    router_z: Tensor
    """Mean over tokens and mixture layers of logsumexp(logits) squared; 0 without any."""
    attention_span: Tensor
    """Tokens that heads with a learned span attend to, in the mean; 0 without such heads."""
    exit_loss: Tensor
    """Weighted mean of the cross-entropies at the exits of `depth=early_exit`; 0 without exits, and in evaluation."""


class UpdateLoad:
    """How many tokens each expert of each mixture layer got in the update so far, over all workers."""

    def __init__(self) -> None:
        self._counts_N: Tensor | None = None

    def reset(self) -> None:
        """A new update begins."""
        self._counts_N = None

    def add(self, counts_LE: Sequence[Tensor]) -> Sequence[Tensor]:
        """Add one forward's counts (one tensor per layer) and return those of the update so far. All workers call it
        together; one reduction for all layers."""
        counts_N = torch.cat(list(counts_LE))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts_N)
        if self._counts_N is not None:
            counts_N = counts_N + self._counts_N
        self._counts_N = counts_N
        return counts_N.split([len(counts_E) for counts_E in counts_LE])


def load_balancing_loss(routing: Routing, counts_E: Tensor | None = None, weights_E: Tensor | None = None) -> Tensor:
    """E * sum_e f_e P_e (Switch Transformer, arXiv 2101.03961, eq. 4-6, for top-k).

    f_e is the share of the assignments that expert e got (of `counts_E` if given, else of this routing's own, T*K if
    every slot holds an expert), P_e its mean clean probability, so perfect balance gives 1 for every K. The gradient
    flows through P_e alone. The router's own decision counts, whatever rules have taken away since (Switch counts
    before the capacity, too).

    Args:
        weights_E: eta, by which the load of each expert is weighed (MoE++, arXiv 2410.07348): experts of a small
            weight should have more load. It is 1 where f and P are as 1 / eta.
    """
    num_experts = routing.probs_TE.shape[1]
    if counts_E is None:
        counts_E = count_per_expert(routing.as_decided.ids_TK, num_experts)
    share_E = counts_E / counts_E.sum().clamp(min=1)
    if weights_E is not None:
        return (1 / weights_E).sum() * (weights_E * share_E * routing.probs_TE.mean(dim=0)).sum()
    return num_experts * (share_E * routing.probs_TE.mean(dim=0)).sum()


def count_per_row(routing: Routing, rows: int) -> Tensor:
    """`counts_BE`: assignments of each expert in each of the `rows` rows of the batch."""
    ids_BTK = routing.as_decided.ids_TK.unflatten(0, (rows, -1))
    experts_E = torch.arange(routing.probs_TE.shape[1], device=ids_BTK.device)
    return (ids_BTK.flatten(1)[..., None] == experts_E).sum(dim=1)


def sequence_balancing_loss(
    routing: Routing, rows: int, weights_E: Tensor | None = None, counts_BE: Tensor | None = None
) -> Tensor:
    """The mean over the `rows` rows of the batch of `load_balancing_loss` of each, which may be given its counts."""
    num_experts = routing.probs_TE.shape[1]
    probs_BTE = routing.probs_TE.unflatten(0, (rows, -1))
    if counts_BE is None:
        counts_BE = count_per_row(routing, rows)
    share_BE = counts_BE / counts_BE.sum(dim=1, keepdim=True).clamp(min=1)
    scale: int | Tensor = num_experts
    if weights_E is not None:
        share_BE, scale = weights_E * share_BE, (1 / weights_E).sum()
    return scale * (share_BE * probs_BTE.mean(dim=1)).sum(dim=1).mean()


def router_z_loss(routing: Routing) -> Tensor:
    """Mean squared logsumexp of the router logits (ST-MoE, arXiv 2202.08906, eq. 5): keeps logits small."""
    return routing.logits_TE.logsumexp(dim=-1).square().mean()


def combine_losses(
    cross_entropy: Tensor,
    routings: Sequence[Routing],
    *,
    load_balancing_weight: float,
    router_z_weight: float,
    scope: Scope = "micro_batch",
    rows: int = 1,
    load: UpdateLoad | None = None,
    balance: Sequence[Tensor | None] | None = None,
    sum_counts: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None,
) -> Losses:
    """The total that training minimizes and its parts; routers' own penalties are in the total alone.

    Args:
        rows: of the batch, for the scope `sequence`.
        load: of the update so far, for the scope `global_batch`; None: this batch is the whole update.
        balance: `weights_E` of each layer, see `load_balancing_loss`; None: all experts alike.
        sum_counts: adds the layers' counts up over the workers that hold slices of these rows; the mean of their losses
            is then that of whole rows, in every scope. None: the rows are whole.
    """
    if not routings:
        zero = torch.zeros_like(cross_entropy)
        return Losses(cross_entropy, cross_entropy.detach(), zero, zero, zero, zero)
    weights = balance or [None] * len(routings)
    counts: Sequence[Tensor | None] = [None] * len(routings)
    if scope == "sequence":
        if sum_counts is not None:
            counts = sum_counts([count_per_row(routing, rows) for routing in routings])
        layers = zip(routings, weights, counts, strict=True)
        balances = [sequence_balancing_loss(routing, rows, w, counts_BE) for routing, w, counts_BE in layers]
    else:
        if scope == "global_batch" and load is not None:
            sum_counts = load.add
        if sum_counts is not None:
            counts = sum_counts([count_per_expert(r.as_decided.ids_TK, r.probs_TE.shape[1]) for r in routings])
        balances = [load_balancing_loss(*layer) for layer in zip(routings, counts, weights, strict=True)]
    mean_balance = torch.stack(balances).mean()
    z = torch.stack([router_z_loss(routing) for routing in routings]).mean()
    total = cross_entropy + load_balancing_weight * mean_balance + router_z_weight * z
    penalties = [routing.penalty for routing in routings if routing.penalty is not None]
    if penalties:
        total = total + torch.stack(penalties).sum() / len(routings)
    zero = torch.zeros_like(z)
    return Losses(total, cross_entropy.detach(), mean_balance.detach(), z.detach(), zero, zero)


def add_span_penalty(losses: Losses, spans: Sequence[LearnedSpan]) -> Losses:
    """The losses with the layers' mean penalty on learned spans in the total (arXiv 1905.07799, eq. 4)."""
    if not spans:
        return losses
    penalty = torch.stack([span.penalty() for span in spans]).mean()
    mean_span = torch.stack([span.spans().mean() for span in spans]).mean()
    return losses._replace(total=losses.total + penalty, attention_span=mean_span.detach())
