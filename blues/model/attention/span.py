"""Learned spans: keys count less beyond each head's own distance (arXiv 1905.07799).

In: positions of queries and keys, and who may see whom at all. Out: a bias for the scores, with a gradient.

Legend: B batch (or 1), T queries, S keys, H query heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from blues.kernels.precision import at_least_float32
from blues.model.attention.patterns import AdaptiveWindow


class LearnedSpan(nn.Module):
    """The learned spans of one layer's heads.

    z = window * sigmoid(raw): inside its bounds without a projection after each step, which the paper has.
    """

    def __init__(self, config: AdaptiveWindow.Config, num_heads: int) -> None:
        super().__init__()
        self.config = config
        self.raw_H = nn.Parameter(torch.full((num_heads,), math.log(config.initial / (1 - config.initial))))

    def spans(self) -> Tensor:
        """`z_H`, in tokens; float32 or better."""
        return self.config.window * at_least_float32(self.raw_H).sigmoid()

    def penalty(self) -> Tensor:
        """`span_penalty` x mean span (arXiv 1905.07799, eq. 4)."""
        return self.config.span_penalty * self.spans().mean()

    def forward(self, query_positions_BT: Tensor, key_positions_BS: Tensor, allowed_BTS: Tensor) -> Tensor:
        """`bias_BHTS` = log m, so that the softmax of score + bias is m exp(score) / sum of m exp(score) (eq. 3).

        m, how much a key counts, is 1 within the span and falls to 0 along the ramp; -inf where it is 0 or the key is
        not allowed. float32 or better.
        """
        distance_B1TS = (query_positions_BT[:, :, None] - key_positions_BS[:, None, :])[:, None]
        m_BHTS = ((self.config.ramp + self.spans()[:, None, None] - distance_B1TS) / self.config.ramp).clamp(0, 1)
        seen_BHTS = allowed_BTS[:, None] & (m_BHTS > 0)
        # log(0) would be multiplied by 0 in the gradient, which is no number
        return torch.where(seen_BHTS, m_BHTS, 1.0).log().masked_fill(~seen_BHTS, -torch.inf)
