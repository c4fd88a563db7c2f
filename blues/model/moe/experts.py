"""The experts' weights, stacked, and the choice of the kernel that applies them.

In: tokens with their routing. Out: each token's weighted sum of its experts.

Legend: T tokens, K experts per token, D width, E experts, F expert width, G = 2F.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from blues.kernels.moe_experts import EXPERTS, resolve
from blues.kernels.precision import matmul_dtype
from blues.model.moe.routing import Routing

Dispatch = Literal["auto", "naive", "sorted", "grouped_mm", "grouped_mm_trimmed"]


class Experts(nn.Module):
    """E SwiGLU experts in two parameters, so that an expert without a token still has a gradient (of zeros) and every
    rank of a data-parallel run reduces the same tensors."""

    def __init__(
        self,
        *,
        dim: int,
        ffn_dim: int,
        num_experts: int,
        dispatch: Dispatch,
        empty_slots: bool = False,
        std: float,
        output_std: float,
        generator: torch.Generator,
    ) -> None:
        """`empty_slots`: see `Router.empty_slots`."""
        super().__init__()
        self.dispatch, self.empty_slots = dispatch, empty_slots
        self.num_experts = num_experts
        self.gate_up_EGD = nn.Parameter(torch.empty(num_experts, 2 * ffn_dim, dim))
        self.down_EDF = nn.Parameter(torch.empty(num_experts, dim, ffn_dim))
        nn.init.normal_(self.gate_up_EGD, std=std, generator=generator)
        nn.init.normal_(self.down_EDF, std=output_std, generator=generator)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """(T, D) -> (T, D). Slots whose id is num_experts or more add nothing."""
        experts = EXPERTS[self.backend(x_TD.device, matmul_dtype(x_TD))]
        return experts(x_TD, routing.ids_TK, routing.weights_TK, self.gate_up_EGD, self.down_EDF)

    def backend(self, device: torch.device, dtype: torch.dtype) -> str:
        """The kernel that runs for products of `dtype` on `device`.

        Raises:
            ConfigError: the one that was asked for by name cannot run there.
        """
        return resolve(self.dispatch, device, dtype, empty_slots=self.empty_slots)
