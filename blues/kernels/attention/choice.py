"""Which implementation of attention runs.

In: a name (or "auto") and a `Situation`. Out: the name of the implementation, or a ConfigError that says why the one
that was asked for cannot. Nothing is ever replaced in silence: a named one runs or raises.

ORDER is by measurement: tuning/benchmarks/records/2026-11-24-attention.json, one H100 80GB, torch 2.11, 12 query heads
on 1 KV head of 64, bfloat16, means of 5 rounds in milliseconds; `blues benchmark attention` makes them anew. Columns,
forward and backward (forward alone): causal, B=8, T=4096; causal, B=1, T=32768; a window of 1024 in B=1, T=32768. Then
one new token: after 32,768, B=1; after 2,048, B=64.

    flash4         1.58 (0.42)    11.1 (2.9)    1.15 (0.26)    0.35    0.18    flash-attn-4 4.0.0b36
    sdpa_cudnn     1.91 (0.48)    13.7 (3.5)    -              0.14    0.12
    flash2         2.78 (0.73)    19.5 (5.5)    1.80 (0.54)    0.18    0.15    flash-attn 2.8.3
    sdpa_flash     2.91 (0.74)    20.2 (5.8)    -              0.14    0.14
    flex           3.13 (0.63)    17.8 (4.6)    1.51 (0.34)    0.72    0.44
    sdpa           1.91 (0.48)    13.4 (3.6)    138  (49.8)    0.15    0.24    cuDNN's kernel, or a dense mask

In that record every call was launched by itself, so that times under 0.5 ms are in part the host's, with spreads of up
to 60% (0.07 ms at B=64); differences below that decide nothing. Since then the benchmark keeps the device busy until
all calls are queued, and has what the host takes in a column of its own.

cuDNN makes a plan for every new number of keys, and at decoding each token brings one, which a record over one number
does not show. So it is chosen for training alone, and decoding goes to `sdpa_flash`, the same within the spread.
FlexAttention is compiled for seconds for every length; so windows go to flash2 first, where that is installed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from blues.errors import ConfigError
from blues.kernels.attention.flash import attention_flash2, attention_flash4, missing_flash2, missing_flash4
from blues.kernels.attention.flex import attention_flex
from blues.kernels.attention.naive import attention_naive
from blues.kernels.attention.sdpa import (
    attention_sdpa,
    attention_sdpa_cudnn,
    attention_sdpa_flash,
    attention_sdpa_math,
)
from blues.kernels.attention.sight import AttentionFunction
from blues.kernels.attention.situation import HALF, Situation

logger = logging.getLogger("blues")

WINDOWS = ("full", "causal", "window")
AUTO = "auto"


@dataclass(frozen=True)
class Backend:
    """An implementation. refuses: why it cannot serve a situation, or None. missing: what it lacks here, or None."""

    attend: AttentionFunction
    refuses: Callable[[Situation], str | None]
    missing: Callable[[], str | None] = lambda: None


def _half_on_cuda(situation: Situation, what: str, head_dim: int) -> str | None:
    """The conditions that fused half-precision kernels share."""
    if not situation.cuda:
        return f"{what} runs on CUDA, not on {situation.device}"
    if situation.dtype not in HALF:
        return f"{what} takes bfloat16 and float16, not {_name(situation)}"
    if situation.capability is not None and situation.capability < (8, 0):
        return f"{what} needs compute capability 8.0, this device has {_capability(situation)}"
    if situation.head_dim % 8 or situation.head_dim > head_dim:
        return f"{what} needs a head_dim that is a multiple of 8 up to {head_dim}, got {situation.head_dim}"
    return None


def _no_masks(situation: Situation, what: str, forms: tuple[str, ...]) -> str | None:
    return None if situation.form in forms else f"{what} reads no {situation.form.replace('_', ' ')}"


NO_GRADIENT_OF_BIAS = "torch's flash attention on CPU has no gradient for a bias"


def _refuse_sdpa(situation: Situation) -> str | None:
    if not situation.cuda:
        return NO_GRADIENT_OF_BIAS if situation.form == "bias" and situation.training else None
    if situation.form in ("full", "causal") and situation.dtype in HALF:
        return _half_on_cuda(situation, "flash attention", 256)
    multiple = {2: 8, 4: 4}.get(situation.dtype.itemsize)
    if multiple is None:
        return f"torch's fused kernels on CUDA do not take {_name(situation)}"
    if situation.head_dim % multiple:
        return f"memory-efficient attention needs a head_dim that is a multiple of {multiple}, got {situation.head_dim}"
    return None


def _refuse_sdpa_flash(situation: Situation) -> str | None:
    if not situation.cuda:
        return NO_GRADIENT_OF_BIAS if situation.form == "bias" and situation.training else None
    what = "flash attention"
    return _half_on_cuda(situation, what, 256) or _no_masks(situation, f"{what} of torch", ("full", "causal"))


def _refuse_cudnn(situation: Situation) -> str | None:
    return _half_on_cuda(situation, "cuDNN", 128) or _no_masks(situation, "cuDNN", ("full", "causal"))


def _refuse_flex(situation: Situation) -> str | None:
    if situation.form == "bias":
        return "FlexAttention reads no bias"
    if not situation.cuda:
        return "FlexAttention has no gradient on CPU" if situation.training else None
    if situation.dtype.itemsize > 4:
        return f"FlexAttention does not take {_name(situation)} on CUDA"
    if situation.head_dim < 16 or situation.head_dim > 256:
        return f"FlexAttention needs a head_dim of 16 to 256 on CUDA, got {situation.head_dim}"
    return None


def _refuse_flash2(situation: Situation) -> str | None:
    return _half_on_cuda(situation, "flash-attn 2", 256) or _no_masks(situation, "flash-attn 2", WINDOWS)


def _refuse_flash4(situation: Situation) -> str | None:
    capability = situation.capability
    if situation.cuda and capability is not None and capability[0] not in (9, 10):
        return f"flash-attn-4 is for Hopper and Blackwell (9.x, 10.x), this device has {_capability(situation)}"
    largest = 128 if capability is not None and capability[0] == 10 else 256
    return _half_on_cuda(situation, "flash-attn-4", largest) or _no_masks(situation, "flash-attn-4", WINDOWS)


BACKENDS: dict[str, Backend] = {
    "naive": Backend(attention_naive, lambda situation: None),
    "sdpa": Backend(attention_sdpa, _refuse_sdpa),
    "sdpa_math": Backend(attention_sdpa_math, lambda situation: None),
    "sdpa_flash": Backend(attention_sdpa_flash, _refuse_sdpa_flash),
    "sdpa_cudnn": Backend(attention_sdpa_cudnn, _refuse_cudnn),
    "flex": Backend(attention_flex, _refuse_flex),
    "flash2": Backend(attention_flash2, _refuse_flash2, missing_flash2),
    "flash4": Backend(attention_flash4, _refuse_flash4, missing_flash4),
}
"""Implementations by the name of `Attention.Config.backend`."""

ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("sdpa", "sdpa_math"),
    "training": ("flash4", "sdpa_cudnn", "flash2", "sdpa_flash"),
    "reading": ("flash4", "flash2", "sdpa_flash"),
    "decoding": ("sdpa_flash", "flash2", "flash4"),
    "window": ("flash4", "flash2", "flex"),
    "block_mask": ("flex",),
    "mask": (),
    "bias": (),
    "rest": ("sdpa", "flex", "sdpa_math"),
}
"""What "auto" tries, fastest first; see the module's docstring. "rest" follows each row but the first."""


def supports(backend: str, situation: Situation) -> str | None:
    """Why `backend` cannot serve `situation` (a clause for an error), None if it can.

    Raises:
        ConfigError: there is no such backend.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"attention.backend: no {backend!r}; choose from {AUTO}, {', '.join(BACKENDS)}")
    return BACKENDS[backend].refuses(situation) or BACKENDS[backend].missing()


@lru_cache(maxsize=1024)
def choose(backend: str, situation: Situation) -> str:
    """The implementation that serves `situation`; logged at the first time.

    Raises:
        ConfigError: the named one cannot.
    """
    if backend != AUTO:
        reason = supports(backend, situation)
        if reason is not None:
            raise ConfigError(f"attention.backend: {backend} cannot run here: {reason}; change it or set it to auto")
        chosen = backend
    else:
        chosen = next(name for name in candidates(situation) if supports(name, situation) is None)
    logger.info("attention: %s (%s) for %s", chosen, backend, situation)
    return chosen


def candidates(situation: Situation) -> tuple[str, ...]:
    """What "auto" tries in this order; the last one takes everything."""
    if not situation.cuda:
        return ORDER["cpu"]
    first: str = situation.form
    if first in ("full", "causal"):
        first = "training" if situation.training else "decoding" if situation.cache else "reading"
    elif first == "window" and situation.cache:
        first = "decoding"
    return ORDER[first] + ORDER["rest"]


def _name(situation: Situation) -> str:
    return str(situation.dtype).removeprefix("torch.")


def _capability(situation: Situation) -> str:
    return ".".join(map(str, situation.capability or ()))
