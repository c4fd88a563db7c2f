"""No rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from blues import config as cfg
from blues.model.rope.rotary import RotaryEmbedding


class NoPE(RotaryEmbedding, variant="nope"):
    """No positions at all (arXiv 2305.19466): the causal mask alone tells the order.

    In some layers only: `attention.rope_layers`, e.g. RRRN (RNoPE, arXiv 2501.18795).
    """

    @cfg.configclass
    class Config(RotaryEmbedding.Config):
        pass

    def frequencies(self, device: torch.device, length: int | Tensor) -> Tensor:
        """Zeros: no pair turns. Layers without rotation skip even that."""
        return torch.zeros(self.head_dim // 2, device=device)
