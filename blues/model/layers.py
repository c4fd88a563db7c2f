"""The plain layers: linear, RMSNorm, SwiGLU.

In: activations. Out: activations of the same width. Weights are drawn at construction from the generator given, so a
model is a function of its configuration and its seed.

Legend: D width, F hidden width, ... any leading dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blues.kernels.moe_experts import swiglu
from blues.kernels.precision import at_least_float32


class Linear(nn.Linear):
    """`x @ weight.T` without bias; the weight is normal(0, std)."""

    def __init__(self, in_features: int, out_features: int, *, std: float, generator: torch.Generator) -> None:
        super().__init__(in_features, out_features, bias=False)
        nn.init.normal_(self.weight, std=std, generator=generator)

    def reset_parameters(self) -> None:
        """Nothing: the constructor draws from its own generator and leaves torch's global one alone."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467), computed in float32 or better."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`."""
        wide = at_least_float32(x)
        return F.rms_norm(wide, (x.shape[-1],), self.weight.to(wide.dtype), self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (arXiv 2002.05202); gate and up are one matrix, the gate's rows first."""

    def __init__(self, dim: int, hidden_dim: int, *, std: float, output_std: float, generator: torch.Generator) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden_dim, std=std, generator=generator)
        self.down = Linear(hidden_dim, dim, std=output_std, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down(swiglu(self.gate_up(x)))
