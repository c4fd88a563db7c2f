"""Experts without matrices: easy tokens are sent to them and cost next to nothing.

In: tokens and their routing, in which ids from E on are null experts. Out: what these add.

Legend: T tokens, K slots per token, D width, E experts with matrices, N null experts, J constant ones.
"""

from __future__ import annotations

import abc

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blues import config as cfg
from blues.errors import ConfigError
from blues.kernels.precision import at_least_float32
from blues.model.moe.routing import Routing


class NullExperts(nn.Module, cfg.Configurable, family="null_experts"):
    """A family: experts that a router chooses like any other, and that are computed without matrices."""

    @cfg.configclass
    class Config(cfg.Config):
        """tau: the load of an expert with matrices, relative to that of a null expert, at which the balancing loss is
        lowest; smaller sends more tokens to null experts. Routers that balance themselves do not see it."""

        zero: int = 1
        copy: int = 1
        constant: int = 1
        tau: float = 0.75

        def __post_init__(self) -> None:
            for name in ("zero", "copy", "constant"):
                if getattr(self, name) < 0:
                    raise ConfigError(f"{name}: must not be negative, got {getattr(self, name)}")
            if self.number == 0:
                raise ConfigError("zero: one of zero, copy and constant must be at least 1; or set null_experts=null")
            if not 0 < self.tau <= 1:
                raise ConfigError(f"tau: must be above 0 and at most 1, got {self.tau}")

        @property
        def number(self) -> int:
            """All null experts."""
            return self.zero + self.copy + self.constant

    def __init__(self, config: Config, *, dim: int, num_experts: int, std: float, generator: torch.Generator) -> None:
        """`num_experts`: E, those with matrices."""
        super().__init__()
        self.config, self.num_experts = config, num_experts

    @abc.abstractmethod
    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """(T, D) -> (T, D): the weighted sum of each token's null experts."""

    def shares(self) -> list[float]:
        """Of the load at balance: of each of the E experts with matrices, then of each null one."""
        total = self.config.tau * self.num_experts + self.config.number
        return [self.config.tau / total] * self.num_experts + [1 / total] * self.config.number

    def balance(self, device: torch.device) -> Tensor:
        """`eta_E` (E + N numbers): what the balancing loss weighs each expert by, 1 or tau."""
        ids_E = torch.arange(self.num_experts + self.config.number, device=device)
        return torch.where(ids_E < self.num_experts, 1.0, self.config.tau)


class MoEPlusPlus(NullExperts, variant="zero_copy_constant"):
    """Zero, copy and constant experts (MoE++, arXiv 2410.07348): 0, x, and a1 x + a2 v with softmax(W x) = (a1, a2).

    They have the ids behind the experts with matrices: first the zero, then the copy, then the constant ones, each of
    which has its own learned v and W. The balancing loss weighs a null expert's load by `tau`, so that it is
    lowest where experts with matrices have tau times the load of null ones. The paper's gating residuals between
    layers are not part of it.
    """

    config: NullExperts.Config

    def __init__(
        self, config: NullExperts.Config, *, dim: int, num_experts: int, std: float, generator: torch.Generator
    ) -> None:
        super().__init__(config, dim=dim, num_experts=num_experts, std=std, generator=generator)
        self.first_copy = num_experts + config.zero
        self.first_constant = self.first_copy + config.copy
        if config.constant:
            self.vector_JD = nn.Parameter(torch.empty(config.constant, dim))
            self.mix_JD2 = nn.Parameter(torch.empty(config.constant, dim, 2))
            nn.init.normal_(self.vector_JD, std=std, generator=generator)
            nn.init.normal_(self.mix_JD2, std=std, generator=generator)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        weights_TK, ids_TK = routing.weights_TK, routing.ids_TK
        wide_TD = at_least_float32(x_TD)
        is_copy_TK = (ids_TK >= self.first_copy) & (ids_TK < self.first_constant)
        factor_T = (weights_TK * is_copy_TK).sum(dim=-1)
        if not self.config.constant:
            return (factor_T[:, None] * wide_TD).to(x_TD.dtype)
        ids_J = self.first_constant + torch.arange(self.config.constant, device=ids_TK.device)
        weights_TJ = (weights_TK[..., None] * (ids_TK[..., None] == ids_J)).sum(dim=1)
        with torch.autocast(x_TD.device.type, enabled=False):
            wide_JD, wide_JD2 = self.vector_JD.to(wide_TD.dtype), self.mix_JD2.to(wide_TD.dtype)
            mix_TJ2 = torch.einsum("td,jdm->tjm", wide_TD, wide_JD2).softmax(dim=-1) * weights_TJ[..., None]
            factor_T = factor_T + mix_TJ2[..., 0].sum(dim=-1)
            return torch.addcmul(mix_TJ2[..., 1] @ wide_JD, factor_T[:, None], wide_TD).to(x_TD.dtype)


def null_naive(x_TD: Tensor, routing: Routing, null: MoEPlusPlus) -> Tensor:
    """Token by token and slot by slot: the reference of `MoEPlusPlus.forward`."""
    rows = []
    for x_D, ids_K, weights_K in zip(x_TD, routing.ids_TK.tolist(), routing.weights_TK, strict=True):
        y_D = torch.zeros_like(x_D)
        for expert, weight in zip(ids_K, weights_K, strict=True):
            constant = expert - null.first_constant
            if null.first_copy <= expert < null.first_constant:
                y_D = y_D + weight * x_D
            elif 0 <= constant < null.config.constant:
                a = F.softmax(x_D @ null.mix_JD2[constant], dim=-1)
                y_D = y_D + weight * (a[0] * x_D + a[1] * null.vector_JD[constant])
        rows.append(y_D)
    return torch.stack(rows)
