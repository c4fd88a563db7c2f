"""Experts switched off in the course of training, and some of them on again.

In: what the router decided over the updates. Out: the router's mask `off_E`, which closes experts before it decides.
Their weights stay: `blues prune --dead` takes them away.

Legend: T tokens, E experts (those that the router knows), S statistics.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from blues import config as cfg
from blues.errors import ConfigError
from blues.kernels.moe_experts import count_per_expert
from blues.model.context import Context
from blues.model.moe.routing import Router, Routing
from blues.model.moe.rules.base import Rule


class Regrowth(cfg.Configurable, family="expert_regrowth"):
    """A family: which switched-off experts get another chance when others are switched off."""

    @cfg.configclass
    class Config(cfg.Config):
        count: int = 1

        def __post_init__(self) -> None:
            if self.count < 1:
                raise ConfigError(f"count: must be at least 1, got {self.count}")

    def __init__(self, config: Config) -> None:
        self.config = config

    @abc.abstractmethod
    def choose(self, off_E: Tensor, update: int) -> list[int]:
        """The experts (at most `count`) of those that are off (bool, CPU) that come on again."""


class RandomRegrowth(Regrowth, variant="random"):
    """Experts drawn at random come back, as connections do in SET (arXiv 1707.04780), RigL's control (1911.11134)."""

    def choose(self, off_E: Tensor, update: int) -> list[int]:
        asleep = off_E.nonzero()[:, 0]
        order = torch.randperm(len(asleep), generator=torch.Generator().manual_seed(update))
        return asleep[order[: self.config.count]].tolist()


class SwitchOff(Rule, variant="switch_off"):
    """Switch the least used experts off on a schedule in training (gradual pruning, Zhu and Gupta, arXiv 1710.01878).

    From update `start` to update `until`, every `every` updates, the share that is off rises to `share` along the
    paper's cubic; the experts with the fewest tokens since the last change go. At least top_k stay. With `regrowth`
    some that are off come back at each change, for as many others. After `until` nothing changes.
    """

    removes = "dropped_out"
    fits = ("language_aware", "noisy_top_k", "sigmoid_bias", "softmax_top_k")

    @cfg.configclass
    class Config(Rule.Config):
        share: float = 0.5
        start: int = 1_000
        until: int = 5_000
        every: int = 500
        regrowth: Regrowth.Config | None = None

        def __post_init__(self) -> None:
            if not 0 < self.share < 1:
                raise ConfigError(f"share: must be above 0 and below 1, got {self.share}")
            if not 1 <= self.start <= self.until:
                raise ConfigError(f"start: must be from 1 to until ({self.until}), got {self.start}")
            if self.every < 1:
                raise ConfigError(f"every: must be at least 1, got {self.every}")

    config: Config
    score_E: Tensor
    updates: Tensor

    def __init__(self, config: Config, *, router: Router, share_E: Sequence[float]) -> None:
        super().__init__(config, router=router, share_E=share_E)
        variant = router.config._variant
        if variant not in self.fits:
            raise ConfigError(
                f"moe.rules: switch_off does not fit moe.router={variant}, which closing an expert's logit does not "
                f"keep from it; take one of {', '.join(self.fits)}"
            )
        if router.off_E is not None:
            raise ConfigError("moe.rules: switch_off is there twice; once is enough")
        router.off_E = torch.zeros(router.num_experts, dtype=torch.bool)
        self._routers = (router,)  # in a tuple: it is the layer's module, not this one's
        self.least_on, self.num_statistics = router.top_k, router.num_experts
        self.regrowth: Regrowth | None = None if config.regrowth is None else config.regrowth.build()
        self.register_buffer("score_E", torch.zeros(router.num_experts))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def applies(self) -> bool:
        """Never: the router's mask does it all."""
        return False

    def forward(self, routing: Routing, context: Context) -> Routing:
        return routing

    def statistics(self, decided: Routing) -> Tensor:
        """Tokens of each expert."""
        return count_per_expert(decided.ids_TK, self.num_experts).float()

    def adapt(self, sums_S: Tensor) -> None:
        self.updates += 1
        self.score_E += sums_S
        update, config = int(self.updates), self.config
        if not config.start <= update <= config.until or (update - config.start) % config.every:
            return
        (router,) = self._routers
        assert router.off_E is not None  # made in __init__
        off_E = self.next_off(router.off_E.cpu(), self.score_E.cpu(), update)
        router.off_E.copy_(off_E)
        self.score_E.zero_()

    def next_off(self, off_E: Tensor, score_E: Tensor, update: int) -> Tensor:
        """`off_E` after the change at `update` (bool, CPU)."""
        off_E = off_E.clone()
        back = [] if self.regrowth is None else self.regrowth.choose(off_E, update)
        off_E[back] = False
        # Neither what is off nor what has just come back can go now.
        order = score_E.masked_fill(off_E, torch.inf).sort(stable=True).indices.tolist()
        going = [expert for expert in order if not off_E[expert] and expert not in back]
        off_E[going[: max(0, self.wanted(update) - int(off_E.sum()))]] = True
        return off_E

    def wanted(self, update: int) -> int:
        """How many experts are to be off after the change at `update`."""
        config = self.config
        left = 1 - (update - config.start + config.every) / (config.until - config.start + config.every)
        share = config.share * (1 - max(0.0, left) ** 3)
        return min(round(share * self.num_experts), self.num_experts - self.least_on)


def switched_on_metrics(layers: Sequence[tuple[int, nn.Module]]) -> dict[str, float]:
    """experts/layer_NN/switched_on of the mixture layers (number, layer) in which experts may be off; waits for the
    device once a layer, and not at all without such layers."""
    found = {}
    for layer, moe in layers:
        off_E = moe.get_submodule("router").off_E
        if isinstance(off_E, Tensor):
            found[f"experts/layer_{layer:02d}/switched_on"] = float((~off_E).sum())
    return found
