"""One layer of the transformer: attention, then a feed-forward layer or a mixture of experts, each on a pre-norm.

In: the residual stream. Out: the residual stream, and the `Routing` if the layer is a mixture.

Legend: B batch, T time, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blues.model.attention.layer import Attention, KVCache, View
from blues.model.context import Context
from blues.model.layers import RMSNorm, SwiGLU
from blues.model.moe.layer import MoE
from blues.model.moe.routing import Routing


class BlockParts(nn.Module):
    """What every kind of block is made of."""

    def __init__(
        self,
        *,
        layer: int,
        dim: int,
        attention: Attention.Config,
        ffn_dim: int,
        moe: MoE.Config | None,
        norm_eps: float,
        std: float,
        output_std: float,
        generator: torch.Generator,
    ) -> None:
        """`layer`: number in the cache, from 0. `moe`: makes this layer a mixture; None a dense one of `ffn_dim`."""
        super().__init__()
        self.layer = layer
        drawn = {"std": std, "output_std": output_std, "generator": generator}
        self.attention_norm = RMSNorm(dim, eps=norm_eps)
        self.attention: Attention = attention.build(dim=dim, norm_eps=norm_eps, **drawn)
        self.feed_forward_norm = RMSNorm(dim, eps=norm_eps)
        self.feed_forward: SwiGLU | MoE
        if moe is None:
            self.feed_forward = SwiGLU(dim, ffn_dim, std=std, output_std=output_std, generator=generator)
        else:
            self.feed_forward = moe.build(dim=dim, **drawn)

    def feed(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Routing | None]:
        """What the second half of the block adds to the residual stream, and the routing of a mixture."""
        hidden_BTD = self.feed_forward_norm(x_BTD)
        if isinstance(self.feed_forward, MoE):
            return self.feed_forward(hidden_BTD, context)
        return self.feed_forward(hidden_BTD), None


class Block(BlockParts):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def forward(
        self, x_BTD: Tensor, view: View, context: Context, cache: KVCache | None = None
    ) -> tuple[Tensor, Routing | None]:
        """(B, T, D) -> (B, T, D) and the routing of a mixture."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), view, cache, self.layer)
        y_BTD, routing = self.feed(x_BTD, context)
        return x_BTD + y_BTD, routing
