"""Which dtype an operation computes in.

In: a tensor, or its dtype and device. Out: the dtype, or the tensor in it. Parameters may be bfloat16 (DeepSpeed
converts the whole module), float32 (tests, CPU training), float32 under autocast, or float64 (exact tests).
"""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is already: for softmax, norms, losses and routers."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product with `x` has: autocast's where it is on, else the dtype of `x`.

    For operations that autocast does not know (`grouped_mm`, our own autograd functions).
    """
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
