"""The experts of a mixture: each token through the k SwiGLU experts it was routed to, weighted and summed. Dropless.

In: tokens, the experts chosen for each, their weights, and all experts' matrices stacked. Out: one vector a token,
y_t = sum_k weights_tk * down_e(silu(gate_e x_t) * up_e x_t) with e = ids_tk.

Every implementation has the signature `(x_TD, ids_TK, weights_TK, gate_up_EGD, down_EDF) -> y_TD`; gate_up holds an
expert's gate in its first F rows and its up projection in the last F. No expert has a capacity and no token is dropped
(MegaBlocks, arXiv 2211.15841). Experts without a token get a gradient of zeros.

An id of E or more is a slot without an expert: it adds nothing, and neither its weight nor its token gets a gradient
from it. A token may have several such slots, so tokens can have different numbers of experts.

Legend: T tokens, K experts per token, N = T*K pairs, D width, E experts, F expert width, G = 2F.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blues.errors import ConfigError
from blues.kernels.precision import matmul_dtype

Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def swiglu(gate_up_NG: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension (arXiv 2002.05202)."""
    gate_NF, up_NF = gate_up_NG.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


def experts_naive(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """Every expert on every token, weighted by 0 where it was not chosen: the reference."""
    y_TD = torch.zeros_like(x_TD, dtype=weights_TK.dtype)
    for expert, (gate_up_GD, down_DF) in enumerate(zip(gate_up_EGD, down_EDF, strict=True)):
        weight_T = (weights_TK * (ids_TK == expert)).sum(dim=-1)
        y_TD = y_TD + weight_T[:, None] * F.linear(swiglu(F.linear(x_TD, gate_up_GD)), down_DF)
    return y_TD.to(matmul_dtype(x_TD))


def experts_sorted(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """Sort the token-expert pairs by expert, then one product per expert over its rows. Any device and dtype.

    The sizes of the groups are read by the host: on an accelerator this waits for it once a layer.
    """
    order = sort_by_expert(ids_TK, gate_up_EGD.shape[0])
    counts = order.counts_E.tolist()
    x_ND = gather_tokens(x_TD, order, sum(counts))
    # unbind, unlike indexing, gives the stacked matrices one gradient instead of one full-size gradient per expert.
    y_ND = torch.cat(
        [
            F.linear(swiglu(F.linear(x_nD, gate_up_GD)), down_DF)
            for x_nD, gate_up_GD, down_DF in zip(
                x_ND.split(counts), gate_up_EGD.unbind(), down_EDF.unbind(), strict=True
            )
        ]
    )
    return combine(y_ND, order, weights_TK)


def experts_grouped_mm(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Sort by expert, then two grouped products over all experts. The host never waits; compiles without a break.

    Rows of slots without an expert lie behind the last group: grouped_mm leaves them as the memory was, not numbers
    perhaps, forward and backward. `combine` and the gradient of `gather_tokens` leave them out.
    """
    order = sort_by_expert(ids_TK, gate_up_EGD.shape[0])
    return _grouped_products(x_TD, order, None, weights_TK, gate_up_EGD, down_EDF)


def experts_grouped_mm_trimmed(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """`experts_grouped_mm` without the rows of slots that hold no expert, for routers that leave most slots empty.

    The host reads the number of rows: it waits for the device once a layer, and nothing can be compiled across. With 2
    of 8 slots used (16k tokens, D = 768, F = 2048, an H100 in bfloat16) forward and backward take 6.2 ms and 1.7 GiB
    instead of 9.6 ms and 3.4 GiB.
    """
    order = sort_by_expert(ids_TK, gate_up_EGD.shape[0])
    return _grouped_products(x_TD, order, int(order.counts_E.sum()), weights_TK, gate_up_EGD, down_EDF)


def _grouped_products(
    x_TD: Tensor, order: Order, rows: int | None, weights_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The experts' outputs from the first `rows` sorted pairs (None: of all), combined."""
    offsets_E = order.counts_E.cumsum(0, dtype=torch.int32)
    dtype = matmul_dtype(x_TD)  # autocast does not reach grouped_mm
    x_ND = gather_tokens(x_TD.to(dtype), order, rows)
    hidden_NF = swiglu(F.grouped_mm(x_ND, gate_up_EGD.to(dtype).transpose(1, 2), offs=offsets_E))
    y_ND = F.grouped_mm(hidden_NF, down_EDF.to(dtype).transpose(1, 2), offs=offsets_E)
    return combine(y_ND, order, weights_TK)


EXPERTS: dict[str, Experts] = {
    "naive": experts_naive,
    "sorted": experts_sorted,
    "grouped_mm": experts_grouped_mm,
    "grouped_mm_trimmed": experts_grouped_mm_trimmed,
}
"""Implementations by the name of `MoE.Config.dispatch`."""


class Order(NamedTuple):
    """The N = T*K token-expert pairs sorted by expert; pairs of one expert keep the order of their tokens, and pairs
    without an expert come last."""

    pairs_N: Tensor
    """Sorted place -> pair t*K + k."""
    places_N: Tensor
    """Pair -> sorted place: the inverse permutation."""
    unused_N: Tensor
    """Pair -> whether it has no expert."""
    counts_E: Tensor
    """Pairs of each expert (int64)."""
    top_k: int


def sort_by_expert(ids_TK: Tensor, num_experts: int) -> Order:
    """Sort the pairs of `ids_TK` by expert, stably. Runs on the device without a wait."""
    ids_N = ids_TK.reshape(-1)
    pairs_N = ids_N.argsort(stable=True)
    places_N = torch.empty_like(pairs_N).scatter_(0, pairs_N, torch.arange(len(ids_N), device=ids_N.device))
    counts_E = count_per_expert(ids_TK, num_experts)
    return Order(pairs_N, places_N, ids_N >= num_experts, counts_E, ids_TK.shape[1])


def count_per_expert(ids_TK: Tensor, num_experts: int) -> Tensor:
    """`counts_E` (int64): how many tokens chose each expert. Unlike bincount, no wait and no atomics on CUDA."""
    experts_E = torch.arange(num_experts, device=ids_TK.device)
    return (ids_TK.reshape(-1, 1) == experts_E).sum(dim=0)


def gather_tokens(x_TD: Tensor, order: Order, rows: int | None = None) -> Tensor:
    """`x_ND`: each pair's token in the order of the experts; only the first `rows` of them if given."""
    return _GatherTokens.apply(x_TD, order.pairs_N[:rows], order.places_N, order.unused_N, order.top_k)


def combine(y_ND: Tensor, order: Order, weights_TK: Tensor) -> Tensor:
    """`y_TD`: each token's weighted sum of its experts' outputs, added in float32 or better.

    Rows of pairs without an expert may hold anything, or be missing."""
    y_TKD = _PairRows.apply(y_ND, order.places_N, order.pairs_N, order.unused_N).unflatten(0, (-1, order.top_k))
    return (y_TKD * weights_TK[..., None]).sum(dim=1).to(y_ND.dtype)


def _rows_of_pairs(rows_UD: Tensor, places_N: Tensor) -> Tensor:
    """Sorted rows in the order of the pairs; rows of pairs without an expert may be missing."""
    missing = len(places_N) - len(rows_UD)
    if missing:
        rows_UD = F.pad(rows_UD, (0, 0, 0, missing))
    return rows_UD.index_select(0, places_N)


class _GatherTokens(torch.autograd.Function):
    """Rows x[pair // K]; the gradient gathers too and sums a token's K rows, instead of adding rows by index
    (slow on the CPU, in an order that varies on CUDA)."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, pairs_U: Tensor, places_N: Tensor, unused_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(places_N, unused_N)
        ctx.top_k = top_k
        return x_TD.index_select(0, pairs_U // top_k)

    @staticmethod
    def backward(ctx: Any, grad_UD: Tensor) -> tuple[Tensor, None, None, None, None]:
        places_N, unused_N = ctx.saved_tensors
        grad_ND = _rows_of_pairs(grad_UD, places_N).masked_fill_(unused_N[:, None], 0)
        return grad_ND.unflatten(0, (-1, ctx.top_k)).sum(dim=1), None, None, None, None


class _PairRows(torch.autograd.Function):
    """`_rows_of_pairs` in float32 or better, zeros for pairs without an expert; the gradient gathers by the inverse
    permutation."""

    @staticmethod
    def forward(ctx: Any, y_UD: Tensor, places_N: Tensor, pairs_N: Tensor, unused_N: Tensor) -> Tensor:
        ctx.save_for_backward(pairs_N[: len(y_UD)])
        ctx.dtype = y_UD.dtype
        # One pass widens and leaves out. A product with 0 would not do: what was never computed need not be a number.
        zero_1 = y_UD.new_zeros(1, dtype=torch.promote_types(y_UD.dtype, torch.float32))
        return torch.where(unused_N[:, None], zero_1, _rows_of_pairs(y_UD, places_N))

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None]:
        (pairs_U,) = ctx.saved_tensors
        return grad_ND.to(ctx.dtype).index_select(0, pairs_U), None, None, None


def resolve(dispatch: str, device: torch.device, dtype: torch.dtype, *, empty_slots: bool = False) -> str:
    """The implementation that `dispatch` names; "auto" is grouped_mm on CUDA in bfloat16, else sorted.

    `empty_slots`: whether most slots may hold no expert; "auto" then takes grouped_mm_trimmed for grouped_mm.

    Raises:
        ConfigError: grouped_mm was asked for by name where torch has no fast kernel for it.
    """
    fast = device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 0)
    if dispatch == "auto":
        return ("grouped_mm_trimmed" if empty_slots else "grouped_mm") if fast else "sorted"
    grouped = dispatch.startswith("grouped_mm")
    if grouped and device.type == "cuda" and not fast:
        raise ConfigError(
            f"moe.dispatch: {dispatch} on CUDA needs bfloat16 and compute capability 8.0, got {dtype} on {device}; "
            "set moe.dispatch=sorted or training.precision=bf16"
        )
    if grouped and dtype == torch.float64:
        raise ConfigError(f"moe.dispatch: {dispatch} has no float64; set moe.dispatch=sorted")
    return dispatch
