"""Pruning of experts: criteria score them on one calibration pass, actions make layers smaller, a recipe repeats it.

In: a trained `Transformer` and batches. Out: a smaller one. `blues prune` (blues/cluster/prune.py) is this for runs.
Pruning in the course of training is blues/model/moe/dynamic_pruning.py. Importing this package registers all members.
"""

from blues.model.moe.pruning.actions import Action, LayerPlan
from blues.model.moe.pruning.budget import Budget
from blues.model.moe.pruning.calibration import LayerStatistics, calibrate
from blues.model.moe.pruning.criteria import Criterion
from blues.model.moe.pruning.recipe import (
    Recipe,
    apply_recipe,
    plan_layers,
    read_recipe,
    save_recipe,
    subset_sizes,
)

__all__ = [
    "Action",
    "Budget",
    "Criterion",
    "LayerPlan",
    "LayerStatistics",
    "Recipe",
    "apply_recipe",
    "calibrate",
    "plan_layers",
    "read_recipe",
    "save_recipe",
    "subset_sizes",
]
