"""Rules that take pairs of token and expert away. Importing this package registers them."""

from blues.model.moe.rules.base import Rule
from blues.model.moe.rules.capacity import CapacityByPosition, CapacityByWeight
from blues.model.moe.rules.dropout import ExpertDropout, PairDropout
from blues.model.moe.rules.skip import SkipLight
from blues.model.moe.rules.switch_off import RandomRegrowth, Regrowth, SwitchOff

__all__ = [
    "CapacityByPosition",
    "CapacityByWeight",
    "ExpertDropout",
    "PairDropout",
    "RandomRegrowth",
    "Regrowth",
    "Rule",
    "SkipLight",
    "SwitchOff",
]
