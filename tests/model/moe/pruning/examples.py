"""A model and tokens to prune with."""

from __future__ import annotations

import torch

from blues.data.mixture.batches import Batch
from blues.data.mixture.packing import IGNORED
from blues.model.moe.pruning import Action, Budget, Criterion, Recipe, calibrate, plan_layers, subset_sizes
from blues.model.transformer import Transformer
from tests.model.examples import lively, small, tokens


def model(**changes) -> Transformer:
    return lively(small(**changes).build()).eval()


def batch(of: Transformer, padding: int = 3) -> Batch:
    """Four rows; the last tokens of the first are padding."""
    inputs_BT = tokens(of, batch=4, length=12, seed=1)
    targets_BT = inputs_BT.clone()
    if padding:
        targets_BT[0, -padding:] = IGNORED
    return Batch(inputs_BT, targets_BT, torch.zeros(4, dtype=torch.long), None)


def recipe(of: Transformer, criterion: str = "reap", action: str = "remove", **budget) -> Recipe:
    chosen, done = Criterion.variants[criterion].Config().build(), Action.variants[action].Config().build()
    spent = Budget(**(budget or {"keep": 2}))
    statistics = calibrate(of, [batch(of)], subset_sizes=subset_sizes(of, chosen, spent))
    plans = plan_layers(of, statistics, chosen, done, spent)
    return Recipe(checkpoint="0", criterion=chosen.config, action=done.config, budget=spent, layers=plans)
