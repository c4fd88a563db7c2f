"""A bias for every language.

In: tokens and the numbers of their languages. Out: a `Routing` to the k most probable experts given both.

Legend: T tokens, D width, E experts, L languages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.context import Context
from blues.model.moe.routing import LinearRouter, Router, Routing, choose


class LanguageAware(LinearRouter, variant="language_aware"):
    """Softmax top-k with a learned bias per language on the logits (between token and task routing, arXiv 2110.03742).

    Languages are numbered from 1; 0, no number, and numbers above `num_languages` are unknown and have no bias. The
    biases start at 0 and learn through the weights and the balancing loss.
    """

    @cfg.configclass
    class Config(Router.Config):
        num_languages: int = 64

        def __post_init__(self) -> None:
            if self.num_languages < 1:
                raise ConfigError(f"num_languages: must be at least 1, got {self.num_languages}")

    config: Config

    def __init__(self, config: Config, *, num_experts: int, **runtime: Any) -> None:
        super().__init__(config, num_experts=num_experts, **runtime)
        self.bias_LE = nn.Parameter(torch.zeros(config.num_languages, num_experts))

    def forward(self, x_TD: Tensor, context: Context) -> Routing:
        logits_TE = self.logits(x_TD)
        logits_TE = logits_TE + self.bias(context).to(logits_TE.dtype)
        return choose(logits_TE, logits_TE, self.top_k)

    def bias(self, context: Context) -> Tensor:
        """`bias_TE`. Also without languages it has a gradient (of zeros), as every parameter must."""
        languages_BT = context.languages_BT
        if languages_BT is None:
            languages_BT = torch.zeros_like(context.tokens_BT)
        numbers_T = languages_BT.flatten().long()
        numbers_T = numbers_T.masked_fill((numbers_T < 0) | (numbers_T > self.config.num_languages), 0)
        table_LE = torch.cat([torch.zeros_like(self.bias_LE[:1]), self.bias_LE])
        return nn.functional.embedding(numbers_T, table_LE)
