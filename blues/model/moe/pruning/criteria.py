"""Which experts matter: a family of criteria over one calibration pass.

In: the statistics of a layer and its experts' weights. Out: a score for every expert (more is better) and the ones
that stay. f_j(x) is expert j's output, g_j(x) its weight among the chosen (they sum to 1), and means are over the
tokens that are routed to j; an expert without any has the score 0.

Legend: E experts.
"""

from __future__ import annotations

import abc
import math
from typing import ClassVar

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.moe.layer import MoE
from blues.model.moe.pruning.calibration import LayerStatistics


class Criterion(cfg.Configurable, family="pruning_criterion"):
    """A family: a score for every expert of a layer."""

    @cfg.configclass
    class Config(cfg.Config):
        pass

    needs_tokens: ClassVar[bool] = True
    """Whether there is anything to learn from a calibration pass."""
    needs_subsets: ClassVar[bool] = False
    """Whether the pass must measure subsets, which is why their size must be known before."""

    sets_budget: ClassVar[bool] = False
    """Whether the scores themselves say how many stay: all above 0."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @abc.abstractmethod
    def scores(self, statistics: LayerStatistics, moe: MoE) -> Tensor:
        """`scores_E` in float64."""

    def keep(self, statistics: LayerStatistics, scores_E: Tensor, count: int) -> tuple[int, ...]:
        """The `count` experts that stay, by number; of equal ones the first."""
        return tuple(sorted(scores_E.sort(descending=True, stable=True).indices[:count].tolist()))

    def check(self, num_experts: int, count: int) -> None:
        """
        Raises:
            ConfigError: the criterion cannot choose `count` of `num_experts`.
        """


class Frequency(Criterion, variant="frequency"):
    """Number of routed tokens N_j (the usual baseline; M-SMoE's choice of dominant experts, arXiv 2310.01334)."""

    def scores(self, statistics: LayerStatistics, moe: MoE) -> Tensor:
        return statistics.count_E


class GateMass(Criterion, variant="gate_mass"):
    """Sum of gates, sum g_j (soft counting in SEER-MoE, arXiv 2404.05089)."""

    def scores(self, statistics: LayerStatistics, moe: MoE) -> Tensor:
        return statistics.gate_E


class ActivationNorm(Criterion, variant="ean"):
    """Expert activation norm, sum ||f_j|| (EAN, arXiv 2504.05586)."""

    def scores(self, statistics: LayerStatistics, moe: MoE) -> Tensor:
        return statistics.norm_E


class Reap(Criterion, variant="reap"):
    """Router-weighted expert activation, mean of g_j ||f_j|| (REAP, arXiv 2510.13999)."""

    def scores(self, statistics: LayerStatistics, moe: MoE) -> Tensor:
        return mean(statistics.gated_norm_E, statistics.count_E)


class MeanActivationNorm(Criterion, variant="man"):
    """Mean activation norm, mean of ||f_j|| (MAN, arXiv 2606.15716)."""

    def scores(self, statistics: LayerStatistics, moe: MoE) -> Tensor:
        return mean(statistics.norm_E, statistics.count_E)


class MeanSquaredActivationNorm(Criterion, variant="msan"):
    """Mean squared activation norm, mean of ||f_j||^2 (MSAN, arXiv 2606.15716)."""

    def scores(self, statistics: LayerStatistics, moe: MoE) -> Tensor:
        return mean(statistics.square_E, statistics.count_E)


class Aimer(Criterion, variant="aimer"):
    """Weights alone, minus mean|w| / rms(w) (AIMER, arXiv 2603.18492): experts of evenly sized weights go first.

    The paper prunes the experts with the highest quotient; the sign is turned so that more is better here too."""

    needs_tokens = False

    def scores(self, statistics: LayerStatistics, moe: MoE) -> Tensor:
        experts = moe.experts
        w_EN = torch.cat([experts.gate_up_EGD.flatten(1), experts.down_EDF.flatten(1)], dim=1).detach().double()
        return -(w_EN.abs().mean(dim=1) / w_EN.square().mean(dim=1).sqrt().clamp(min=1e-300)).cpu()


class SubsetSearch(Criterion, variant="naee"):
    """Exact search for the subset of experts C with the least ||F(x; C) - F(x)|| (NAEE, arXiv 2402.14800).

    An expert's score is what the best subset without it loses against the best one with it, in the root mean square
    over tokens. C(8, 4) = 70 subsets a layer; more than `max_subsets` are refused."""

    needs_subsets = True

    @cfg.configclass
    class Config(Criterion.Config):
        max_subsets: int = 2000

        def __post_init__(self) -> None:
            if self.max_subsets < 1:
                raise ConfigError(f"max_subsets: must be at least 1, got {self.max_subsets}")

    config: Config

    def check(self, num_experts: int, count: int) -> None:
        subsets = math.comb(num_experts, count)
        if subsets > self.config.max_subsets:
            raise ConfigError(
                f"criterion naee: {count} of {num_experts} experts are {subsets:,} subsets, and each is run on all "
                f"tokens; at most {self.config.max_subsets:,} are tried (max_subsets). Use --criterion reap"
            )

    def scores(self, statistics: LayerStatistics, moe: MoE) -> Tensor:
        errors_C = self._errors(statistics)
        scores = []
        for expert in range(len(statistics.count_E)):
            inside = torch.tensor([expert in subset for subset in statistics.subsets])
            best = [float(errors_C[chosen].min()) if chosen.any() else 0.0 for chosen in (~inside, inside)]
            scores.append(best[0] - best[1])
        return torch.tensor(scores, dtype=torch.float64)

    def keep(self, statistics: LayerStatistics, scores_E: Tensor, count: int) -> tuple[int, ...]:
        best = statistics.subsets[int(self._errors(statistics).argmin())]
        if len(best) != count:
            raise ValueError(f"subsets of {len(best)} experts were measured, and {count} are to stay")
        return best

    def _errors(self, statistics: LayerStatistics) -> Tensor:
        if statistics.error_C is None:
            raise ValueError("the calibration pass measured no subsets")
        return (statistics.error_C / max(1, statistics.tokens)).sqrt()


class SwitchedOn(Criterion, variant="alive"):
    """Experts that dynamic pruning left switched on score 1, the others 0 (RigL's mask, arXiv 1911.11134)."""

    needs_tokens = False
    sets_budget = True

    def scores(self, statistics: LayerStatistics, moe: MoE) -> Tensor:
        return alive(moe).double()


def alive(moe: MoE) -> Tensor:
    """`alive_E`, bool (CPU): all of them unless dynamic pruning switched some off."""
    off_R = moe.router.off_E
    if off_R is None:
        return torch.ones(moe.experts.num_experts, dtype=torch.bool)
    return ~off_R[: moe.experts.num_experts].cpu()


def mean(sum_E: Tensor, count_E: Tensor) -> Tensor:
    """Sum over count; 0 where nothing was counted."""
    return torch.where(count_E > 0, sum_E / count_E.clamp(min=1), 0.0)
