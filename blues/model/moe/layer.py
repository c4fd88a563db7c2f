"""The mixture-of-experts layer: a router and its experts in the place of a feed-forward layer.

In: the residual stream after its norm. Out: the layer's addition to it, and the `Routing` for losses and metrics.

Legend: B batch, T time (in `Routing`: batch and time flattened), D width.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.compute import PAIRS, count_pairs
from blues.model.context import Context
from blues.model.moe.experts import Dispatch, Experts
from blues.model.moe.null_experts import NullExperts
from blues.model.moe.redirect import Redirect
from blues.model.moe.routers import GroupLimited, NoisyTopK
from blues.model.moe.routing import Router, Routing
from blues.model.moe.rules import Rule
from blues.model.moe.shared_experts import SharedExperts

Scope = Literal["micro_batch", "sequence", "global_batch"]


class MoE(nn.Module, cfg.Configurable):
    """Token-choice mixture of SwiGLU experts, dropless unless a rule says otherwise; shared and null experts beside."""

    @cfg.configclass
    class Config(cfg.Config):
        num_experts: int = 8
        top_k: int = 2
        ffn_dim: int = 2048
        every: int = 2
        """Layer i (from 0) is a mixture iff (i + 1) % every == 0."""
        router: Router.Config = NoisyTopK.Config()
        load_balancing_weight: float = 0.01
        load_balancing_scope: Scope = "micro_batch"
        """Over which tokens the load is to be balanced, see `blues.model.losses`."""
        router_z_weight: float = 0.001
        dispatch: Dispatch = "auto"
        shared_experts: SharedExperts.Config | None = None
        null_experts: NullExperts.Config | None = None
        rules: tuple[Rule.Config, ...] = ()
        """Take pairs of token and expert away after the router has decided, one rule after the other."""
        redirect: Redirect.Config | None = None
        """What stands behind a router that knows more experts than there are, as pruning may leave it."""
        num_routed: int | None = None
        """How many such a router knows."""

        def __post_init__(self) -> None:
            for name in ("num_experts", "top_k", "ffn_dim", "every"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
            if self.top_k > self.num_experts:
                raise ConfigError(f"top_k: cannot exceed num_experts ({self.num_experts}), got {self.top_k}")
            for name in ("load_balancing_weight", "router_z_weight"):
                if getattr(self, name) < 0:
                    raise ConfigError(f"{name}: must not be negative, got {getattr(self, name)}")
            if self.null_experts is not None and self.redirect is not None:
                raise ConfigError(
                    "null_experts: cannot stand beside a redirect, which numbers the same experts; set one"
                )
            names = [str(rule._variant) for rule in self.rules]
            for name in names:
                if names.count(name) > 1:
                    raise ConfigError(f"rules: {name} is there {names.count(name)} times; once is enough")
            if "skip_light" in names and self.top_k == 1 < self.num_experts:
                raise ConfigError("rules: skip_light drops a second expert, and top_k is 1; remove the rule")
            if self.null_experts is not None and isinstance(self.router, GroupLimited.Config):
                raise ConfigError(
                    "null_experts: belong to no group of router=group_limited; take another router or no null experts"
                )

    def __init__(self, config: Config, *, dim: int, std: float, output_std: float, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        null = config.null_experts
        self.router: Router = config.router.build(
            dim=dim,
            num_experts=(config.num_routed or config.num_experts) + (null.number if null else 0),
            top_k=config.top_k,
            std=std,
            generator=generator,
        )
        self.experts = Experts(
            dim=dim,
            ffn_dim=config.ffn_dim,
            num_experts=config.num_experts,
            dispatch=config.dispatch,
            empty_slots=self.router.empty_slots,
            std=std,
            output_std=output_std,
            generator=generator,
        )
        self.redirect: Redirect | None = None
        if config.redirect is not None:
            self.redirect = config.redirect.build(dim=dim, num_experts=config.num_experts, num_routed=config.num_routed)
        # Drawn after the routed experts: these have the same weights with and without them.
        drawn: dict[str, Any] = {"dim": dim, "std": std, "generator": generator}
        self.null_experts: NullExperts | None = null.build(num_experts=config.num_experts, **drawn) if null else None
        self.shared_experts: SharedExperts | None = None
        if config.shared_experts is not None:
            self.shared_experts = config.shared_experts.build(ffn_dim=config.ffn_dim, output_std=output_std, **drawn)
        share_E = [1 / self.router.num_experts] * self.router.num_experts
        if self.null_experts is not None:
            share_E = self.null_experts.shares()
        rules: list[Rule] = [rule.build(router=self.router, share_E=share_E) for rule in config.rules]
        self.rules = nn.ModuleList(rules)

    def forward(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Routing]:
        """(B, T, D) -> (B, T, D) and the routing of its B*T tokens."""
        x_TD = x_BTD.flatten(0, 1)
        routing = self.router(x_TD, context)
        if self.is_conditional:
            routing = self._apply_rules(routing, context)
        if self.redirect is None:
            y_TD = self.experts(x_TD, routing)
        else:
            y_TD = self.redirect(x_TD, routing, self.experts)
        if self.null_experts is not None:
            y_TD = y_TD + self.null_experts(x_TD, routing)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD.unflatten(0, x_BTD.shape[:2]), routing

    @property
    def is_conditional(self) -> bool:
        """Whether pairs of token and expert may cost less than the router's choice says."""
        return self.null_experts is not None or len(self.rules) > 0

    def _apply_rules(self, decided: Routing, context: Context) -> Routing:
        """The routing that is computed, with what became of the pairs."""
        routing, everybody = decided, self.router.num_experts
        pairs = dict.fromkeys(PAIRS, torch.zeros((), dtype=torch.int64, device=decided.ids_TK.device))
        left = pairs["chosen"] = count_pairs(decided.ids_TK, everybody)
        for rule in self._rules:
            if rule.applies:
                routing = rule(routing, context)
                before, left = left, count_pairs(routing.ids_TK, everybody)
                pairs[rule.removes] = pairs[rule.removes] + before - left
        ids_TK = routing.ids_TK if self.redirect is None else self.redirect.targets(routing.ids_TK)
        pairs["computed"] = count_pairs(ids_TK, self.experts.num_experts)
        pairs["null"] = left - pairs["computed"]
        changed = None if routing is decided else decided
        return routing._replace(decided=changed, pairs_P=torch.stack([pairs[name] for name in PAIRS]))

    @property
    def _rules(self) -> list[Rule]:
        return [cast(Rule, rule) for rule in self.rules]

    def balance(self, device: torch.device) -> Tensor | None:
        """`eta_E`: what the balancing loss weighs the load of each expert by; None: all alike."""
        return None if self.null_experts is None else self.null_experts.balance(device)

    def statistics(self, routing: Routing) -> Tensor | None:
        """`Router.statistics` of the router and then of the rules; None if none of them keeps state."""
        decided = routing.as_decided
        parts = [self.router.statistics(decided), *(rule.statistics(decided) for rule in self._rules)]
        kept = [sums_S for sums_S in parts if sums_S is not None]
        return torch.cat(kept) if kept else None

    def adapt(self, sums_S: Tensor) -> None:
        """Hand the router and the rules their sums over the update."""
        sizes = [rule.num_statistics for rule in self._rules]
        of_router = len(sums_S) - sum(sizes)
        if of_router:
            self.router.adapt(sums_S[:of_router])
        for rule, sums_R in zip(self._rules, sums_S[of_router:].split(sizes), strict=True):
            if len(sums_R):
                rule.adapt(sums_R)

    def pairs(self, routing: Routing) -> Tensor:
        """`pairs_P` of `blues.model.compute`: what became of the pairs of this layer's routing."""
        if routing.pairs_P is not None:
            return routing.pairs_P
        computed = chosen = count_pairs(routing.ids_TK, self.router.num_experts)
        if self.redirect is not None:
            computed = count_pairs(self.redirect.targets(routing.ids_TK), self.experts.num_experts)
        zero = torch.zeros_like(chosen)
        counts = {"chosen": chosen, "computed": computed, "null": chosen - computed}
        return torch.stack([counts.get(name, zero) for name in PAIRS])

    def num_idle_parameters(self) -> int:
        """Parameters of experts that a token does not use. With null experts the mean at the load that balancing aims
        at."""
        experts = self.experts
        one_expert = (experts.gate_up_EGD.numel() + experts.down_EDF.numel()) // experts.num_experts
        share = 1.0
        if self.null_experts is not None:
            share = sum(self.null_experts.shares()[: experts.num_experts])
        idle = experts.num_experts - self.config.top_k * share
        return round(idle * one_expert)


def mixtures(model: nn.Module) -> list[tuple[int, MoE]]:
    """The mixture layers of a `Transformer` with their numbers among all layers (from 0), in order."""
    layers = enumerate(block.get_submodule("feed_forward") for block in model.get_submodule("blocks").children())
    return [(layer, moe) for layer, moe in layers if isinstance(moe, MoE)]
