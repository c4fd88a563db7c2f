"""A token's experts from few groups of experts.

In: tokens. Out: a `Routing` to the k best experts within each token's best groups.

Legend: T tokens, E experts, K experts per token, N groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.moe.routers.sigmoid_bias import SigmoidBias


class GroupLimited(SigmoidBias, variant="group_limited"):
    """Group- or node-limited sigmoid routing with bias (DeepSeek-V2, arXiv 2405.04434; V3, arXiv 2412.19437).

    Experts lie in `num_groups` groups of neighbours, such as those of one machine. A group's score is the sum of its
    two highest affinities plus bias (V3's rule); a token goes to its k best experts within its `top_groups` best
    groups, so that it has to travel to few machines. Otherwise this is `sigmoid_bias`. Groups differ by one expert at
    most where their number does not divide the experts.
    """

    @cfg.configclass
    class Config(SigmoidBias.Config):
        num_groups: int = 2
        top_groups: int = 1

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 1 <= self.top_groups <= self.num_groups:
                raise ConfigError(
                    f"top_groups: must be from 1 to num_groups ({self.num_groups}), got {self.top_groups}"
                )

    config: Config

    def __init__(self, config: Config, *, num_experts: int, top_k: int, **runtime: Any) -> None:
        """
        Raises:
            ConfigError: more groups than experts, or groups too small for k experts.
        """
        super().__init__(config, num_experts=num_experts, top_k=top_k, **runtime)
        members = [number * config.num_groups // num_experts for number in range(num_experts)]
        sizes = sorted(members.count(group) for group in range(config.num_groups))
        room = sum(sizes[: config.top_groups])
        if sizes[0] == 0 or room < top_k:
            raise ConfigError(
                f"moe.router.top_groups: the smallest {config.top_groups} of {config.num_groups} groups of "
                f"{num_experts} experts hold {room}; every group needs one, and the chosen ones moe.top_k ({top_k}); "
                "lower moe.router.num_groups or raise moe.router.top_groups"
            )
        self.smallest = sizes[0]

    def choose(self, biased_TE: Tensor) -> Tensor:
        experts_E = torch.arange(self.num_experts, device=biased_TE.device)
        members_E = experts_E * self.config.num_groups // self.num_experts
        groups_N = torch.arange(self.config.num_groups, device=biased_TE.device)
        member_NE = members_E == groups_N[:, None]
        scores_TNE = biased_TE[:, None].masked_fill(~member_NE, -torch.inf)
        best_two = scores_TNE.topk(min(2, self.smallest), dim=-1).values
        groups_TG = best_two.sum(dim=-1).topk(self.config.top_groups, dim=-1).indices
        inside_TE = (members_E[:, None] == groups_TG[:, None]).any(dim=-1)
        return biased_TE.masked_fill(~inside_TE, -torch.inf).topk(self.top_k, dim=-1).indices
