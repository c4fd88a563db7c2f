"""The routers, one file each. Importing this package registers them all.

In: nothing. Out: the members of the family `blues.model.moe.routing.Router`.
"""

from blues.model.moe.routers.adaptive_top_k import AdaptiveTopK
from blues.model.moe.routers.document_pools import DocumentPools
from blues.model.moe.routers.expert_choice import ExpertChoice
from blues.model.moe.routers.group_limited import GroupLimited
from blues.model.moe.routers.language_aware import LanguageAware
from blues.model.moe.routers.noisy_top_k import NoisyTopK
from blues.model.moe.routers.relu import ReLURouter
from blues.model.moe.routers.sigmoid_bias import SigmoidBias
from blues.model.moe.routers.softmax_top_k import SoftmaxTopK
from blues.model.moe.routers.threshold import ExpertThreshold
from blues.model.moe.routers.token_hash import TokenHash

__all__ = [
    "AdaptiveTopK",
    "DocumentPools",
    "ExpertChoice",
    "ExpertThreshold",
    "GroupLimited",
    "LanguageAware",
    "NoisyTopK",
    "ReLURouter",
    "SigmoidBias",
    "SoftmaxTopK",
    "TokenHash",
]
