"""What becomes of experts that do not stay: a family of actions.

In: a layer's statistics, its scores, and which experts stay. Out: a `LayerPlan` that says all there is to do, and from
it the tensors of the smaller layer. A plan is pure data: applied twice it gives the same bits.

Legend: E experts before, D width.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.moe.layer import MoE
from blues.model.moe.pruning.calibration import LayerStatistics
from blues.model.moe.pruning.criteria import mean
from blues.model.moe.pruning.rows import check_router, merge_experts, router_rows
from blues.model.moe.redirect import ConstantExperts, MergedExperts, Redirect

GATE_UP, DOWN, TARGET, CONSTANT = "experts.gate_up_EGD", "experts.down_EDF", "redirect.target_R", "redirect.constant_ND"


@cfg.configclass
class LayerPlan(cfg.Config):
    """One layer. layer: its number in the model. num_experts: before. scores: of the criterion. kept: who stays, by
    rising number. targets: for merging, the place in `kept` that each expert goes to. shares: for merging, the weight
    of each expert within its group. means: for constants, the vector of each expert that goes, by rising number."""

    layer: int
    num_experts: int
    scores: tuple[float, ...]
    kept: tuple[int, ...]
    targets: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()
    means: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        E = self.num_experts
        if len(self.scores) != E:
            raise ConfigError(f"scores: {len(self.scores)} for {E} experts")
        if not self.kept or list(self.kept) != sorted(set(self.kept)) or not 0 <= self.kept[0] <= self.kept[-1] < E:
            raise ConfigError(f"kept: {list(self.kept)} must be rising numbers from 0 to {E - 1}, at least one")
        for name in ("targets", "shares"):
            if getattr(self, name) and len(getattr(self, name)) != E:
                raise ConfigError(f"{name}: {len(getattr(self, name))} for {E} experts")
        if any(not 0 <= target < len(self.kept) for target in self.targets):
            raise ConfigError(f"targets: must be places among the {len(self.kept)} experts kept")
        if any(self.targets[expert] != place for place, expert in enumerate(self.kept) if self.targets):
            raise ConfigError("targets: an expert that is kept must go to itself")
        if self.means and (len(self.means) != E - len(self.kept) or len({len(row) for row in self.means}) > 1):
            raise ConfigError(f"means: must be {E - len(self.kept)} vectors of one width, of the experts that go")

    @property
    def gone(self) -> tuple[int, ...]:
        """Who does not stay."""
        return tuple(expert for expert in range(self.num_experts) if expert not in self.kept)


class Action(cfg.Configurable, family="pruning_action"):
    """A family: from a choice of experts to a plan, and from a plan to a layer's tensors."""

    @cfg.configclass
    class Config(cfg.Config):
        pass

    redirect: ClassVar[Redirect.Config | None] = None
    """What the layer has behind its router afterwards; None: the router has forgotten the experts."""
    needs_tokens: ClassVar[bool] = True
    """Whether it goes by the calibration pass."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def check(self, moe: MoE) -> None:
        """
        Raises:
            ConfigError: it cannot be done to this layer (why not).
        """
        if moe.router.num_experts != moe.experts.num_experts:
            raise ConfigError(
                f"action {self.config._variant}: the router knows {moe.router.num_experts} choices for "
                f"{moe.experts.num_experts} experts already; only --action remove can prune such a layer"
            )

    @abc.abstractmethod
    def plan(self, statistics: LayerStatistics, scores_E: Tensor, kept: Sequence[int]) -> LayerPlan:
        """The plan for one layer."""

    @abc.abstractmethod
    def tensors(self, state: Mapping[str, Tensor], plan: LayerPlan) -> dict[str, Tensor]:
        """The layer's tensors afterwards; `state` is that of the layer before, by names within the layer."""


class Remove(Action, variant="remove"):
    """Take the experts and their rows in the router away; their tokens go to the next best ones (NAEE, 2402.14800)."""

    needs_tokens = False

    def check(self, moe: MoE) -> None:
        check_router(moe.router)

    def plan(self, statistics: LayerStatistics, scores_E: Tensor, kept: Sequence[int]) -> LayerPlan:
        return LayerPlan(layer=statistics.layer, **common(scores_E, kept))

    def tensors(self, state: Mapping[str, Tensor], plan: LayerPlan) -> dict[str, Tensor]:
        kept = torch.tensor(plan.kept)
        made = {}
        for name, tensor in state.items():
            if name in (GATE_UP, DOWN):
                made[name] = tensor.index_select(0, kept)
            elif name.startswith("router."):
                made[name] = router_rows(name.removeprefix("router."), tensor, plan.kept, plan.num_experts)
            else:
                made[name] = tensor
        return made


class MeanOutput(Action, variant="mean_output"):
    """Replace each expert by a constant, its mean output over its own tokens (MoNE, arXiv 2507.00390)."""

    redirect = ConstantExperts.Config()

    def plan(self, statistics: LayerStatistics, scores_E: Tensor, kept: Sequence[int]) -> LayerPlan:
        mean_ED = mean(statistics.output_ED, statistics.count_E[:, None]).float()
        gone = [expert for expert in range(len(scores_E)) if expert not in kept]
        means = tuple(tuple(mean_ED[expert].tolist()) for expert in gone)
        return LayerPlan(layer=statistics.layer, means=means, **common(scores_E, kept))

    def tensors(self, state: Mapping[str, Tensor], plan: LayerPlan) -> dict[str, Tensor]:
        made = dict(state)
        if plan.gone:
            order = {expert: place for place, expert in enumerate([*plan.kept, *plan.gone])}
            made |= {name: state[name].index_select(0, torch.tensor(plan.kept)) for name in (GATE_UP, DOWN)}
            made[TARGET] = torch.tensor([order[expert] for expert in range(plan.num_experts)])
            made[CONSTANT] = torch.tensor(plan.means, dtype=state[DOWN].dtype)
        return made


class Merge(Action, variant="merge"):
    """Merge each expert into the kept one with the most similar router logits, by frequency (M-SMoE, 2310.01334).

    `align`: bring the hidden neurons of the experts into one order first, as the paper does.
    """

    redirect = MergedExperts.Config()

    @cfg.configclass
    class Config(Action.Config):
        align: bool = True

    config: Config

    def plan(self, statistics: LayerStatistics, scores_E: Tensor, kept: Sequence[int]) -> LayerPlan:
        products_EE = statistics.logits_EE
        length_E = products_EE.diagonal().clamp(min=1e-300).sqrt()
        cosine_EE = products_EE / length_E / length_E[:, None]
        nearest_E = cosine_EE[:, list(kept)].argmax(dim=1).tolist()
        places = {expert: place for place, expert in enumerate(kept)}
        targets = [places.get(expert, nearest) for expert, nearest in enumerate(nearest_E)]
        return merged(statistics, scores_E, kept, targets)

    def tensors(self, state: Mapping[str, Tensor], plan: LayerPlan) -> dict[str, Tensor]:
        made, pairs = dict(state), []
        if not plan.gone:
            return made
        for place, dominant in enumerate(plan.kept):
            others = [e for e, target in enumerate(plan.targets) if target == place and e != dominant]
            members = [dominant, *others]
            shares = [plan.shares[member] for member in members]
            pairs.append(merge_experts(state[GATE_UP], state[DOWN], members, shares, align=self.config.align))
        made[GATE_UP], made[DOWN] = (torch.stack(matrices) for matrices in zip(*pairs, strict=True))
        made[TARGET] = torch.tensor(plan.targets)
        return made


class Cluster(Merge, variant="cluster"):
    """Merge clusters of experts with like outputs over all tokens (HC-SMoE, arXiv 2410.08589), by frequency.

    Hierarchical clustering with average linkage on the experts' mean outputs makes as many clusters as experts are to
    stay; the expert of the highest score gives a cluster its name and, with `align`, the order of its neurons.
    """

    def plan(self, statistics: LayerStatistics, scores_E: Tensor, kept: Sequence[int]) -> LayerPlan:
        mean_ED = statistics.everywhere_ED / max(1, statistics.tokens)
        labels = clusters(mean_ED.numpy(), len(kept))
        best: dict[int, int] = {}
        for expert in scores_E.sort(descending=True, stable=True).indices.tolist():
            best.setdefault(labels[expert], expert)
        dominants = sorted(best.values())
        targets = [dominants.index(best[label]) for label in labels]
        return merged(statistics, scores_E, dominants, targets)


def clusters(points_ED: np.ndarray, count: int) -> list[int]:
    """The cluster of each point: average linkage of Euclidean distances, cut where exactly `count` are left."""
    from scipy.cluster.hierarchy import cut_tree, linkage

    if len(points_ED) == 1:
        return [0]
    return cut_tree(linkage(points_ED, method="average"), n_clusters=count)[:, 0].tolist()


def merged(statistics: LayerStatistics, scores_E: Tensor, kept: Sequence[int], targets: Sequence[int]) -> LayerPlan:
    """The plan of groups: an expert's share is that of its group's tokens; of a group without any, all are alike."""
    counts = statistics.count_E.tolist()
    shares = []
    for expert, target in enumerate(targets):
        group = [other for other, place in enumerate(targets) if place == target]
        total = sum(counts[other] for other in group)
        shares.append(counts[expert] / total if total else 1 / len(group))
    return LayerPlan(layer=statistics.layer, targets=tuple(targets), shares=tuple(shares), **common(scores_E, kept))


def common(scores_E: Tensor, kept: Sequence[int]) -> dict:
    """What all plans say."""
    return {"num_experts": len(scores_E), "scores": tuple(scores_E.tolist()), "kept": tuple(kept)}
