"""Rotary position embeddings: the family `rope`, one file for each kind. Importing this package registers them all.

In: nothing. Out: `RotaryEmbedding` (positions -> `Rotation`), its members, and `rotate`, which applies a rotation.
"""

from blues.model.rope.base_change import BaseChange, smallest_base
from blues.model.rope.linear import LinearInterpolation
from blues.model.rope.llama3 import Llama3
from blues.model.rope.longrope import LongRoPE
from blues.model.rope.nope import NoPE
from blues.model.rope.ntk import DynamicNTK, NTKAware
from blues.model.rope.p_rope import PRoPE
from blues.model.rope.resonance import Resonance
from blues.model.rope.rotary import PlainRotary, RotaryEmbedding, rotate
from blues.model.rope.tables import Rotation
from blues.model.rope.yarn import YaRN

__all__ = [
    "BaseChange",
    "DynamicNTK",
    "LinearInterpolation",
    "Llama3",
    "LongRoPE",
    "NTKAware",
    "NoPE",
    "PRoPE",
    "PlainRotary",
    "Resonance",
    "RotaryEmbedding",
    "Rotation",
    "YaRN",
    "rotate",
    "smallest_base",
]
