"""Blocks that not every token goes through: depth as a choice. A member is one module here."""

from blues.model.depth.base import Chosen, Depth, Passing
from blues.model.depth.early_exit import EarlyExit, ExitBlock, confidence
from blues.model.depth.mixture_of_depths import DepthBlock, MixtureOfDepths

__all__ = [
    "Chosen",
    "Depth",
    "DepthBlock",
    "EarlyExit",
    "ExitBlock",
    "MixtureOfDepths",
    "Passing",
    "confidence",
]
