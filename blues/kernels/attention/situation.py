"""What a kernel is told before it is chosen: where it would run, on what, and what it would have to do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from blues.kernels.attention.sight import Form

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Situation:
    """A use of attention.

    capability: of a CUDA device, e.g. (9, 0) for Hopper. form: how the `Sight` is given; a form that a block mask or a
    mask stands beside is still the shorter one. training: a gradient is wanted. cache: fewer queries than keys.
    """

    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    num_heads: int
    num_kv_heads: int
    form: Form = "causal"
    training: bool = True
    cache: bool = False

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


@lru_cache(maxsize=64)
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device; None for others, and where no such device is there to be asked."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)
