"""One pass over tokens that sees all that the criteria of pruning ask for.

In: a model and batches. Out: `LayerStatistics` of each mixture layer: how often every expert was chosen, with what
weight, how large its outputs were, what they were in the mean, and (if asked for) the error that each subset of
experts would make.

Everything is added on the model's device in float64. Padding is not counted. The definitions are the criteria's.

Legend: B batch, T tokens (of all rows), K slots, D width, E experts with weights, R that the router knows, C subsets.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from blues.data.mixture.batches import Batch
from blues.data.mixture.packing import IGNORED
from blues.errors import ConfigError
from blues.kernels.moe_experts import swiglu
from blues.model.moe.experts import Experts
from blues.model.moe.layer import MoE, mixtures
from blues.model.moe.pruning.rows import with_experts
from blues.model.moe.routing import Routing
from blues.model.transformer import Transformer


@dataclass(frozen=True)
class LayerStatistics:
    """Sums over a mixture layer's tokens (float64, CPU). f_j(x): expert j's output; g_j(x): its weight, those of a
    token's experts divided by their sum."""

    layer: int
    tokens: int
    count_E: Tensor
    """Tokens routed to each expert."""
    gate_E: Tensor
    """Sum of g_j over them."""
    norm_E: Tensor
    """Sum of ||f_j||."""
    square_E: Tensor
    """Sum of ||f_j||^2."""
    gated_norm_E: Tensor
    """Sum of g_j ||f_j||."""
    output_ED: Tensor
    """Sum of f_j."""
    logits_EE: Tensor
    """Sum of products of every two experts' logits over all tokens."""
    everywhere_ED: Tensor
    """Sum of f_j over all tokens, routed there or not."""
    subsets: tuple[tuple[int, ...], ...] = ()
    error_C: Tensor | None = None
    """Sum of ||F(x; subset) - F(x)||^2 over all tokens, F being the layer."""


class _Layer:
    """The sums of one layer, on the device."""

    def __init__(self, layer: int, moe: MoE, subset_size: int | None) -> None:
        self.layer, self.moe, self.tokens = layer, moe, 0
        self.num_experts = E = moe.experts.num_experts
        device, dim = moe.experts.down_EDF.device, moe.experts.down_EDF.shape[1]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.scalars_5E, self.output_ED, self.logits_EE, self.everywhere_ED = (
            zeros(5, E),
            zeros(E, dim),
            zeros(E, E),
            zeros(E, dim),
        )
        self.subsets: tuple[tuple[int, ...], ...] = ()
        if subset_size is not None:
            self.subsets = tuple(itertools.combinations(range(E), subset_size))
        self.routers = [with_experts(moe.router, subset, E) for subset in self.subsets]
        self.error_C = zeros(len(self.subsets))
        self.counted_T: Tensor | None = None

    def observe(self, moe: torch.nn.Module, inputs: tuple, output: tuple) -> None:
        """A forward hook of the layer."""
        (x_BTD, context), (_, routing), counted_T = inputs, output, self.counted_T
        if counted_T is None:
            raise RuntimeError("the calibration has not said which tokens count")
        x_TD = x_BTD.flatten(0, 1)
        outputs_TED = expert_outputs(self.moe.experts, x_TD).double()
        weights_TK = routing.weights_TK.double()
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        chosen_TKE = routing.ids_TK[..., None] == torch.arange(self.num_experts, device=x_TD.device)
        chosen_TKE = chosen_TKE & counted_T[:, None, None]
        gate_TE = (chosen_TKE * weights_TK[..., None]).sum(dim=1)
        chosen_TE = chosen_TKE.any(dim=1).double()
        norm_TE = outputs_TED.norm(dim=-1)
        self.scalars_5E += torch.stack(
            [
                chosen_TE.sum(0),
                gate_TE.sum(0),
                (chosen_TE * norm_TE).sum(0),
                (chosen_TE * norm_TE.square()).sum(0),
                (gate_TE * norm_TE).sum(0),
            ]
        )
        self.output_ED += torch.einsum("te,ted->ed", chosen_TE, outputs_TED)
        self.everywhere_ED += torch.einsum("t,ted->ed", counted_T.double(), outputs_TED)
        logits_TE = routing.logits_TE[counted_T, : self.num_experts].double()
        logits_TE = logits_TE.where(logits_TE.isfinite(), 0.0)  # of switched-off experts
        self.logits_EE += logits_TE.T @ logits_TE
        self.tokens += int(counted_T.sum())
        if not self.subsets:
            return
        whole_TD = mixed(outputs_TED, self.moe.router(x_TD, context))
        for number, (subset, router) in enumerate(zip(self.subsets, self.routers, strict=True)):
            own_TD = mixed(outputs_TED[:, list(subset)], router(x_TD, context))
            self.error_C[number] += ((own_TD - whole_TD) * counted_T[:, None]).square().sum()

    def read(self) -> LayerStatistics:
        """The sums so far."""
        count_E, gate_E, norm_E, square_E, gated_norm_E = self.scalars_5E.cpu()
        return LayerStatistics(
            layer=self.layer,
            tokens=self.tokens,
            count_E=count_E,
            gate_E=gate_E,
            norm_E=norm_E,
            square_E=square_E,
            gated_norm_E=gated_norm_E,
            output_ED=self.output_ED.cpu(),
            logits_EE=self.logits_EE.cpu(),
            everywhere_ED=self.everywhere_ED.cpu(),
            subsets=self.subsets,
            error_C=self.error_C.cpu() if self.subsets else None,
        )


@torch.no_grad()
def calibrate(
    model: Transformer, batches: Iterable[Batch], *, subset_sizes: Mapping[int, int] | None = None
) -> list[LayerStatistics]:
    """See the module's docstring.

    Args:
        model: its dtype is that of the forward passes; float32 is the one to decide by.
        subset_sizes: for a layer, the size of the subsets of experts whose error is measured, all of them.

    Raises:
        ConfigError: no mixture layer, no tokens, or experts were merged or replaced already.
    """
    layers = check_prunable(model)
    device, was_training = next(model.parameters()).device, model.training
    observed = [_Layer(layer, moe, (subset_sizes or {}).get(layer)) for layer, moe in layers]
    handles = [layer.moe.register_forward_hook(layer.observe) for layer in observed]
    model.eval()
    try:
        for batch in batches:
            batch = batch.to(device)
            for each in observed:
                each.counted_T = (batch.targets != IGNORED).flatten()
            model.hidden(batch.inputs, documents=batch.documents, languages=batch.languages)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    if observed[0].tokens == 0:
        raise ConfigError("calibration: there were no tokens; raise --tokens")
    return [layer.read() for layer in observed]


def check_prunable(model: Transformer) -> Sequence[tuple[int, MoE]]:
    """The mixture layers with their numbers.

    Raises:
        ConfigError: there are none, or experts were merged or replaced already.
    """
    layers = mixtures(model)
    if not layers:
        raise ConfigError("the model has no mixture layer (model.moe is null), so there are no experts to prune")
    if any(moe.redirect is not None for _, moe in layers):
        raise ConfigError(
            "experts of this model were merged or replaced by constants before, so that its routers no longer say what "
            "an expert is; prune the checkpoint it came from, by both steps at once"
        )
    return layers


def expert_outputs(experts: Experts, x_TD: Tensor) -> Tensor:
    """`f_TED`: every expert's output for every token, in the dtype of the weights."""
    return torch.stack(
        [
            F.linear(swiglu(F.linear(x_TD, gate_up_GD)), down_DF)
            for gate_up_GD, down_DF in zip(experts.gate_up_EGD, experts.down_EDF, strict=True)
        ],
        dim=1,
    )


def mixed(outputs_TED: Tensor, routing: Routing) -> Tensor:
    """`y_TD`: sum over slots of weight times output; ids from E on add nothing."""
    num_experts, weights_TK = outputs_TED.shape[1], routing.weights_TK.to(outputs_TED.dtype)
    weight_TE = weights_TK.new_zeros(len(weights_TK), num_experts + 1)
    weight_TE = weight_TE.scatter_add(1, routing.ids_TK.clamp(max=num_experts), weights_TK)
    return torch.einsum("te,ted->td", weight_TE[:, :num_experts], outputs_TED)
