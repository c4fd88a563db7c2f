"""The skip rule's beta from a trained model.

In: a model with `skip_light` rules, and tokens. Out: the rules with the median ratios of these tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from blues.model.moe.layer import mixtures
from blues.model.moe.rules.skip import SkipLight, ratios


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> list[float]:
    """Set the ratio of every `skip_light` rule without a beta to the exact median of w2 / w1 over these `tokens_BT`.

    The model runs in evaluation with nothing skipped. Returns the medians, one for each such rule, in order of layers.
    """
    found = [
        (number, rule)
        for number, (_, moe) in enumerate(mixtures(model))
        for rule in moe.rules
        if isinstance(rule, SkipLight) and rule.num_statistics
    ]
    training = model.training
    model.eval()
    for _, rule in found:
        rule.ratio.zero_()
    seen: list[list[Tensor]] = [[] for _ in found]
    for tokens_BT in batches:
        routings = model(tokens_BT, num_logits=1).routing
        for (number, _), ratios_of_layer in zip(found, seen, strict=True):
            ratios_of_layer.append(ratios(routings[number].as_decided))
    for (_, rule), ratios_of_layer in zip(found, seen, strict=True):
        rule.ratio.copy_(torch.cat(ratios_of_layer).median())
    model.train(training)
    return [float(rule.ratio) for _, rule in found]
