"""The family of routers: which experts a token goes to, and with what weights.

In: tokens. Out: a `Routing`. Everything is float32 (or better) whatever the model's dtype: small differences of logits
decide between experts. Losses and metrics take the `Routing`; nothing accumulates in secret.

Some routers adapt without a gradient (a bias, a threshold). Such a router says of each `Routing` what it wants to know
(`statistics`: sums of fixed size); the trainer adds these up over the micro batches and workers of an update and hands
the sum back once (`adapt`). What was learned lies in buffers, and so in every checkpoint. They stay float32 whatever
the model is converted to, because their steps are smaller than bfloat16 can add.

Legend: B batch, T tokens (batch and time flattened), D width, E experts, K slots per token, S statistics.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blues import config as cfg
from blues.kernels.precision import at_least_float32
from blues.model.context import Context


class Routing(NamedTuple):
    """One layer's decisions. `probs` and `logits` are clean (without noise); `weights` and `ids` are what was done."""

    weights_TK: Tensor
    ids_TK: Tensor
    """Experts from 0; num_experts (E) means that the slot holds no expert, and its weight is 0."""
    probs_TE: Tensor
    """Rows sum to 1 (or are 0 where a router gives a token nothing)."""
    logits_TE: Tensor
    penalty: Tensor | None = None
    """A scalar that the router wants added to the loss, already weighted; the loss takes the mean over layers."""
    decided: Routing | None = None
    """What the router itself decided, where rules (blues/model/moe/rules) have taken pairs away since."""
    pairs_P: Tensor | None = None
    """int64, `blues.model.compute.PAIRS`: what became of the pairs, where rules or null experts make a difference."""

    @property
    def as_decided(self) -> Routing:
        """The router's own decision, which balancing and adaptation go by."""
        return self if self.decided is None else self.decided


class FixedBuffers(nn.Module):
    """Modules whose floating-point buffers move, but are never rounded, whatever the model is converted to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As torch does it, but floating-point buffers keep their dtype."""
        before: dict[str, Any] = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class Router(FixedBuffers, cfg.Configurable, family="router"):
    """A family. Members implement `forward(x_TD, context) -> Routing`; they must take any `num_experts`."""

    @cfg.configclass
    class Config(cfg.Config):
        pass

    balanced_by: ClassVar[Literal["loss", "itself"]] = "loss"
    """Whether the load-balancing loss applies. "itself": its weight counts as 0, the figure is still reported."""
    is_softmax: ClassVar[bool] = True
    """Whether probabilities are a softmax of the logits, which no common shift changes: the z-loss, which shifts them,
    applies to such routers alone. It would close every gate of the others. Else as `balanced_by="itself"`."""
    empty_slots: ClassVar[bool] = False
    """Whether a routing has many more slots than experts chosen; kernels then leave their rows out, at a wait."""

    def __init__(
        self,
        config: Config,
        *,
        dim: int,
        num_experts: int,
        top_k: int,
        std: float,
        generator: torch.Generator,
    ) -> None:
        """`num_experts`: all that a token may be sent to, experts without weights included."""
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.top_k = top_k
        self.register_buffer("off_E", None)

    off_E: Tensor | None
    """bool, a buffer: experts that a rule (`switch_off`) has closed to all tokens; None: no rule may."""

    @abc.abstractmethod
    def forward(self, x_TD: Tensor, context: Context) -> Routing:
        """Route every token; `context.tokens_BT.flatten()` is in the order of `x_TD`."""

    def statistics(self, routing: Routing) -> Tensor | None:
        """`sums_S` (float32, of a size that never changes) of one forward's routing; None: there is nothing to adapt.

        All entries must be sums over tokens or micro batches, so that those of several may be added."""
        return None

    def adapt(self, sums_S: Tensor) -> None:
        """Take in the statistics of one update, once after its optimizer step. The same on every worker."""


class LinearRouter(Router):
    """Routers whose logits are one matrix product of the token."""

    def __init__(
        self, config: Router.Config, *, dim: int, num_experts: int, std: float, generator: torch.Generator, **rest: Any
    ) -> None:
        super().__init__(config, dim=dim, num_experts=num_experts, std=std, generator=generator, **rest)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.normal_(self.weight, std=std, generator=generator)

    def logits(self, x_TD: Tensor) -> Tensor:
        """`logits_TE`; those of closed experts are minus infinity."""
        logits_TE = project(x_TD, self.weight)
        return logits_TE if self.off_E is None else logits_TE.masked_fill(self.off_E, -torch.inf)


def project(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x @ weight.T in float32 or better, also under autocast."""
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(at_least_float32(x_TD), at_least_float32(weight_ED))


def choose(logits_TE: Tensor, noisy_TE: Tensor, top_k: int) -> Routing:
    """Choose by the noisy logits and weigh by their softmax; report the clean ones.

    With top_k > 1 a token's weights are the softmax over its chosen logits (they sum to 1). With top_k = 1 that weight
    would be the constant 1 and the language loss would not reach the router, so it is the chosen expert's probability
    among all (Switch Transformer, arXiv 2101.03961).
    """
    chosen_TK, ids_TK = noisy_TE.topk(top_k, dim=-1)
    if top_k == 1:
        weights_TK = (chosen_TK - noisy_TE.logsumexp(dim=-1, keepdim=True)).exp()
    else:
        weights_TK = chosen_TK.softmax(dim=-1)
    return Routing(weights_TK, ids_TK, logits_TE.softmax(dim=-1), logits_TE)


def slots(chosen_TE: Tensor, weights_TE: Tensor) -> tuple[Tensor, Tensor]:
    """`weights_TE, ids_TE`: one slot for each expert, left empty (weight 0, id E) where `chosen_TE` is False.

    Tokens may so have any number of experts; the kernels compute chosen slots only (`Router.empty_slots`).
    """
    num_experts = chosen_TE.shape[1]
    experts_E = torch.arange(num_experts, device=chosen_TE.device)
    return weights_TE.masked_fill(~chosen_TE, 0), experts_E.expand_as(chosen_TE).masked_fill(~chosen_TE, num_experts)


def renormalized(scores_TK: Tensor) -> Tensor:
    """Scores (0 or more) divided by their sum; all zeros stay zeros. One score stays as it is: divided by itself it
    would be the constant 1, and the language loss would not reach the router."""
    if scores_TK.shape[1] == 1:
        return scores_TK
    return scores_TK / scores_TK.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores_TK.dtype).tiny)


def shares(scores_TE: Tensor) -> Tensor:
    """`probs_TE` of scores that are no probabilities: divided by their sum; all zeros stay zeros."""
    return scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores_TE.dtype).tiny)
