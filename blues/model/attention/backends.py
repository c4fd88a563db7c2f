"""The choice of an attention implementation.

In: the name in the configuration. Out: the function of blues/kernels/attention.py that runs.
"""

from __future__ import annotations

from typing import Literal

from blues.kernels.attention import ATTENTION, AttentionFunction

Backend = Literal["auto", "naive", "sdpa"]


def resolve(backend: Backend) -> str:
    """The implementation that `backend` names: "auto" is sdpa, on every device."""
    return "sdpa" if backend == "auto" else backend


def attention_function(backend: Backend) -> AttentionFunction:
    """The implementation itself."""
    return ATTENTION[resolve(backend)]
