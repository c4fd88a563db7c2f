"""How many experts stay in each layer.

In: a number or a share, for every layer or for all together. Out: one number for each mixture layer.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError

Scope = Literal["layer", "global"]


@cfg.configclass
class Budget(cfg.Config):
    """keep: experts that stay in every layer. ratio: share of the experts that goes, instead. scope: `global` spends
    the same sum over all layers by score, each score divided by its layer's mean, since layers differ in scale."""

    keep: int | None = None
    ratio: float | None = None
    scope: Scope = "layer"

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.ratio is None):
            raise ConfigError("budget: give either --keep (experts that stay in a layer) or --ratio (share that goes)")
        if self.keep is not None and self.keep < 1:
            raise ConfigError(f"keep: must be at least 1, got {self.keep}")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise ConfigError(f"ratio: must be from 0 to below 1, got {self.ratio}")

    def per_layer(self, num_experts: Sequence[int], at_least: Sequence[int]) -> list[int]:
        """The same rule in every layer. `at_least`: each layer's top_k.

        Raises:
            ConfigError: more than there are, or fewer than a token is sent to.
        """
        counts = [self.keep if self.keep is not None else E - round((self.ratio or 0) * E) for E in num_experts]
        for number, (count, E, least) in enumerate(zip(counts, num_experts, at_least, strict=True)):
            if count > E:
                raise ConfigError(f"keep: {count} experts cannot stay of the {E} in mixture layer {number}")
            if count < least:
                raise ConfigError(
                    f"keep: {count} of {E} experts would stay in mixture layer {number}, and every token is sent to "
                    f"{least} (model.moe.top_k); keep at least {least}"
                )
        return counts

    def over_layers(self, scores: Sequence[Tensor], at_least: Sequence[int]) -> list[int]:
        """As many as `per_layer` in all, where they score most; every layer keeps its `at_least`."""
        total = sum(self.per_layer([len(scores_E) for scores_E in scores], at_least))
        counts, ranked = list(at_least), []
        for layer, (scores_E, least) in enumerate(zip(scores, at_least, strict=True)):
            if bool((scores_E < 0).any()):
                raise ConfigError("scope global: scores below 0 have no share of their layer; use --scope layer")
            relative_E = (scores_E / scores_E.mean().clamp(min=1e-300)).sort(descending=True).values
            ranked += [(-score, layer) for score in relative_E[least:].tolist()]
        for _, layer in sorted(ranked)[: total - sum(counts)]:
            counts[layer] += 1
        return counts
