"""What the tests of CUDA paths share.

bfloat16 keeps 8 bits, so a result of a few products is off by some 2**-8 of its length (0.4%). Errors are relative
lengths |a - b| / |b| against float32 on the same (already rounded) inputs, and a fast path may not be clearly worse
than the naive path in the same bfloat16.
"""

from __future__ import annotations

import pytest
import torch

CUDA = torch.device("cuda")
NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def error(a, b):
    """|a - b| / |b|; where b is zero, |a|."""
    return ((a.double() - b.double()).norm() / (b.double().norm() or 1.0)).item()


def poison():
    """Leave NaN in the memory that the next allocations will get: a kernel that skips part of its output shows."""
    torch.full((2**28,), torch.nan, device=CUDA)
    torch.cuda.synchronize()


def assert_as_good_as_naive(fast, naive, exact, names):
    """Each fast result is right to bfloat16, and no worse than 1.5 times the naive one."""
    for name, a, b, truth in zip(names, fast, naive, exact, strict=True):
        assert torch.isfinite(a).all(), name
        assert error(a, truth) < max(0.01, 1.5 * error(b, truth)), (name, error(a, truth), error(b, truth))
