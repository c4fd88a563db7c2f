"""The attention of one layer: which implementation computes it, and in which format.

In: the layer's settings at build, then queries, keys, values and a view at every forward. Out: the mixed values, from
the implementation of blues/kernels/attention/ that serves this device, format and view.

The device and the format are known when tensors come, so that is when the choice is made, once for each combination;
`resolve` makes the same choice beforehand, for a run to be refused before it starts and for its record.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from blues.kernels.attention import BACKENDS, Form, Sight, Situation, capability_of, choose, form_of
from blues.kernels.precision import matmul_dtype
from blues.model.attention.precision import Precision, Wanted

Backend = Literal["auto", "naive", "sdpa", "sdpa_math", "sdpa_flash", "sdpa_cudnn", "flex", "flash2", "flash4"]


def resolve(
    backend: Backend,
    precision: Wanted = "auto",
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    form: Form = "causal",
    training: bool = True,
    cache: bool = False,
) -> str:
    """The implementation for activations of `dtype` on `device`, in training unless said otherwise.

    Raises:
        ConfigError: the named one cannot run there; says why.
    """
    dtype = Precision(precision).dtype(dtype, device)
    return _resolve(backend, str(device), dtype, head_dim, num_heads, num_kv_heads, form, training, cache)


@torch.compiler.assume_constant_result
def _resolve(
    backend: str,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    form: Form,
    training: bool,
    cache: bool,
) -> str:
    """Plain arguments and a plain result, so that a compiled model takes the answer for a constant."""
    return _chosen(backend, device, dtype, head_dim, num_heads, num_kv_heads, form, training, cache)


@functools.lru_cache(maxsize=1024)
def _chosen(
    backend: str,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    form: Form,
    training: bool,
    cache: bool,
) -> str:
    """Kept, for at decoding making a `Situation` takes the host as long as attention takes the device."""
    place = torch.device(device)
    capability = capability_of(place)
    situation = Situation(place.type, capability, dtype, head_dim, num_heads, num_kv_heads, form, training, cache)
    return choose(backend, situation)


class Attend:
    """Scaled dot-product attention of one layer; see the module's docstring."""

    def __init__(
        self, backend: Backend, precision: Wanted = "auto", *, head_dim: int, num_heads: int, num_kv_heads: int
    ) -> None:
        self.backend = backend
        self.shape = (head_dim, num_heads, num_kv_heads)
        self.precision = Precision(precision)

    def __call__(self, q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, view: Sight) -> Tensor:
        """`out_BTHC` in the dtype of `v_BSGC`."""
        device, activations = v_BSGC.device, v_BSGC.dtype
        dtype = self.precision.dtype(matmul_dtype(v_BSGC), device)
        q_BTHC, k_BSGC, v_BSGC = q_BTHC.to(dtype), k_BSGC.to(dtype), v_BSGC.to(dtype)
        bias_trains = view.mask_BTS is not None and view.mask_BTS.requires_grad
        training = torch.is_grad_enabled() and (
            q_BTHC.requires_grad or k_BSGC.requires_grad or v_BSGC.requires_grad or bias_trains
        )
        cache = q_BTHC.shape[1] != k_BSGC.shape[1]
        name = _resolve(self.backend, str(device), dtype, *self.shape, form_of(view), training, cache)
        with _without_autocast(device):  # the dtype is chosen; autocast would change it
            out_BTHC = BACKENDS[name].attend(q_BTHC, k_BSGC, v_BSGC, view)
        self.precision.watch(out_BTHC)
        return out_BTHC.to(activations)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
