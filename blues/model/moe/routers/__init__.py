"""The routers, one file each. Importing this package registers them all.

In: nothing. Out: the members of the family `blues.model.moe.routing.Router`.
"""

from blues.model.moe.routers.noisy_top_k import NoisyTopK
from blues.model.moe.routers.softmax_top_k import SoftmaxTopK

__all__ = ["NoisyTopK", "SoftmaxTopK"]
