"""FlashAttention 2 and 4, packages that a GPU machine may have beside torch.

They read windows and causality, no masks; queries share KV heads without a copy (12 to 1 too).

- `flash2`: the package flash-attn 2 (arXiv 2307.08691), compiled CUDA. Splits the keys when there are few queries.
- `flash4`: the package flash-attn-4, which is compiled when it is first called. No split of the keys on Hopper, so it
  is slow at decoding.

FlashAttention 4 is no operator of torch; the functions here make it one, so that a model is compiled whole around it.

Legend: B batch, T queries, S keys, H query heads, G KV heads, C channels of a head.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from blues.kernels.attention.sight import Sight, window_of


def missing_flash2() -> str | None:
    """What is not installed for flash2; None if all is there."""
    return None if importlib.util.find_spec("flash_attn_2_cuda") else "flash-attn 2 is not installed"


def missing_flash4() -> str | None:
    """What is not installed for flash4; None if all is there."""
    # Where flash-attn 2 lacks, flash_attn is a namespace; where all lacks, find_spec of a submodule raises.
    there = importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute")
    return None if there and importlib.util.find_spec("cutlass") else "flash-attn-4 is not installed"


def attention_flash2(q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, sight: Sight) -> Tensor:
    """FlashAttention 2, in half precision on CUDA (arXiv 2307.08691)."""
    from flash_attn import flash_attn_func

    return flash_attn_func(q_BTHC, k_BSGC, v_BSGC, causal=sight.is_causal, window_size=window_of(sight))


def attention_flash4(q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, sight: Sight) -> Tensor:
    """FlashAttention 4, in half precision on Hopper and Blackwell (arXiv 2603.05451)."""
    return _flash4(q_BTHC, k_BSGC, v_BSGC, *window_of(sight))[0]


def _window(left: int, right: int) -> dict[str, Any]:
    """Arguments of flash-attn-4, in which None is no limit, and causality has a faster path than a window."""
    if left < 0 and right == 0:
        return {"causal": True}
    return {"window_size_left": left if left >= 0 else None, "window_size_right": right if right >= 0 else None}


@torch.library.custom_op("blues::flash4", mutates_args=())
def _flash4(q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """`out_BTHC`, and the logarithm of the softmax's denominators, `lse_BHT`."""
    from flash_attn.cute import interface

    q_BTHC, k_BSGC, v_BSGC = (x.detach() for x in (q_BTHC, k_BSGC, v_BSGC))
    result = interface._flash_attn_fwd(q_BTHC, k_BSGC, v_BSGC, return_lse=True, **_window(left, right))
    return result[0].contiguous(), result[1].contiguous()


@_flash4.register_fake
def _(q_BTHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    B, T, H, C = q_BTHC.shape
    return q_BTHC.new_empty(B, T, H, C), q_BTHC.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("blues::flash4_backward", mutates_args=())
def _flash4_backward(
    dout_BTHC: Tensor,
    q_BTHC: Tensor,
    k_BSGC: Tensor,
    v_BSGC: Tensor,
    out_BTHC: Tensor,
    lse_BHT: Tensor,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute import interface

    given = (x.detach() for x in (q_BTHC, k_BSGC, v_BSGC, out_BTHC, dout_BTHC, lse_BHT))
    dq_BTHC, dk_BSGC, dv_BSGC = interface._flash_attn_bwd(*given, **_window(left, right))[:3]
    return dq_BTHC.contiguous(), dk_BSGC.contiguous(), dv_BSGC.contiguous()


@_flash4_backward.register_fake
def _(
    dout_BTHC: Tensor,
    q_BTHC: Tensor,
    k_BSGC: Tensor,
    v_BSGC: Tensor,
    out_BTHC: Tensor,
    lse_BHT: Tensor,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (q_BTHC, k_BSGC, v_BSGC))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_BTHC, k_BSGC, v_BSGC, ctx.left, ctx.right = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q_BTHC, k_BSGC, v_BSGC, *output)


def _differentiate(ctx: Any, dout_BTHC: Tensor, dlse_BHT: Tensor | None) -> tuple[Tensor | None, ...]:
    q_BTHC, k_BSGC, v_BSGC, out_BTHC, lse_BHT = ctx.saved_tensors
    given = (dout_BTHC.contiguous(), q_BTHC, k_BSGC, v_BSGC, out_BTHC, lse_BHT)
    return *_flash4_backward(*given, ctx.left, ctx.right), None, None


_flash4.register_autograd(_differentiate, setup_context=_save)
