"""The language-model head and its cross-entropy in one operation.

In: final hidden states, the head's weight, targets. Out: the mean cross-entropy in nats (a scalar of float32 or better)
over the targets that are not `IGNORED`; 0 if all are.

Both implementations have the signature `(x_TD, weight_VD, targets_T, chunk) -> scalar`; `chunk` are the tokens whose
logits are there at once (None: by their memory), and all of them in the naive form.

With V = 200k the logits of 32k tokens would take 26 GB in float32 and their gradient as much again. The chunked form
holds the logits of one chunk of tokens at a time and computes the gradients on the way forward, while those logits are
there (as in Liger, arXiv 2410.10989): memory stays flat in T, and no product is computed twice. torch.compile fuses the
steps of a chunk and takes half the time, but keeps more of them at once (87 ms and 14.7 GiB for the 32k tokens below).

Legend: T tokens (batch and time flattened), D width, V vocabulary, c tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from blues.kernels.precision import at_least_float32, matmul_dtype

IGNORED = -100
"""The target of a token that has no loss."""

CHUNK_BYTES = 2**29
"""Memory for the float32 logits of one chunk on an accelerator: 670 tokens at V = 200k.

Larger chunks add to the weight's gradient less often. For 32k tokens at D = 768 with gradients an H100 takes 238 ms and
1.5 GiB with 2**28, 192 ms and 2.1 GiB with 2**29, 171 ms and 3.6 GiB with 2**30.
"""

CHUNK_BYTES_CPU = 2**23
"""On the CPU a chunk that stays near the caches is faster: 512 tokens at V = 4096."""

LinearCrossEntropy = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]


def linear_cross_entropy_naive(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int | None = None) -> Tensor:
    """All logits at once: the reference."""
    logits_TV = at_least_float32(F.linear(x_TD, weight_VD))
    count = (targets_T != IGNORED).sum().clamp(min=1)
    return F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED, reduction="sum") / count


def linear_cross_entropy_chunked(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int | None = None
) -> Tensor:
    """A chunk of tokens at a time, with memory for one chunk of logits and one gradient of each input."""
    dtype = matmul_dtype(x_TD)
    needs_gradient = torch.is_grad_enabled() and (x_TD.requires_grad or weight_VD.requires_grad)
    if chunk is None:
        budget = CHUNK_BYTES if x_TD.is_cuda else CHUNK_BYTES_CPU
        chunk = max(128, budget // (4 * weight_VD.shape[0]))
    return _ChunkedLinearCrossEntropy.apply(x_TD.to(dtype), weight_VD.to(dtype), targets_T, chunk, needs_gradient)


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int, needs_gradient: bool
    ) -> Tensor:
        count = (targets_T != IGNORED).sum().clamp(min=1)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=x_TD.device)
        if needs_gradient:
            grad_x_TD = torch.empty_like(x_TD)
            # Accumulated over chunks in float32: a bfloat16 sum of many small terms loses them.
            grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide)
        for start in range(0, x_TD.shape[0], chunk):
            piece = slice(start, start + chunk)
            x_cD, targets_c = x_TD[piece], targets_T[piece]
            logits_cV = F.linear(x_cD, weight_VD).to(wide)
            kept_c1 = (targets_c != IGNORED)[:, None]
            targets_c1 = targets_c.clamp(min=0)[:, None]
            # In place from here on: the logits turn into exponentials, then into their own gradient.
            logits_cV -= logits_cV.amax(dim=-1, keepdim=True)
            target_logits_c1 = logits_cV.gather(1, targets_c1)
            sums_c1 = logits_cV.exp_().sum(dim=-1, keepdim=True)
            loss += ((sums_c1.log() - target_logits_c1) * kept_c1).sum()
            if needs_gradient:
                # d loss / d logits = (softmax - one_hot) / count, and 0 for ignored tokens.
                scale_c1 = kept_c1 / count.to(wide)
                logits_cV *= scale_c1 / sums_c1
                grad_cV = logits_cV.scatter_add_(1, targets_c1, -scale_c1).to(x_TD.dtype)
                torch.mm(grad_cV, weight_VD, out=grad_x_TD[piece])
                _accumulate(grad_weight_VD, grad_cV, x_cD)
        if needs_gradient:
            ctx.save_for_backward(grad_x_TD, grad_weight_VD)
            ctx.weight_dtype = weight_VD.dtype
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_x_TD, grad_weight_VD = ctx.saved_tensors
        return grad_x_TD * grad.to(grad_x_TD.dtype), (grad_weight_VD * grad).to(ctx.weight_dtype), None, None, None


def _accumulate(total_VD: Tensor, grad_cV: Tensor, x_cD: Tensor) -> None:
    """total_VD += grad_cV.T @ x_cD, in the dtype of the total."""
    if grad_cV.dtype == total_VD.dtype:
        total_VD.addmm_(grad_cV.T, x_cD)
    else:
        total_VD += grad_cV.T @ x_cD


LINEAR_CROSS_ENTROPY: dict[str, LinearCrossEntropy] = {
    "naive": linear_cross_entropy_naive,
    "chunked": linear_cross_entropy_chunked,
}
"""Implementations by the name of `Transformer.Config.cross_entropy`."""
