"""What attention is measured on: shapes, and tensors of them with what the naive backend makes of these.

In: a shape and a seed. Out: queries, keys, values and a gradient, and the results in float32 to compare with.

Legend: B batch, T queries, S keys, H query heads, G KV heads, C channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from blues.kernels.attention import Sight, attention_naive, dense_mask

CHUNK = 2**28
"""Scores that the reference keeps at a time."""


class Told(NamedTuple):
    """The `Sight` of a shape."""

    mask_BTS: Tensor | None = None
    is_causal: bool = False
    block_mask: BlockMask | None = None
    window: tuple[int, int] | None = None


@dataclass(frozen=True)
class Shape:
    """What is computed. window: keys behind a query that it sees beside its own; None is all of them.

    T < S is decoding: the queries stand at the end of the keys, and no gradient is taken.
    """

    B: int
    T: int
    S: int
    window: int | None = None
    H: int = 12
    G: int = 1
    C: int = 64

    @property
    def trains(self) -> bool:
        return self.T == self.S

    @property
    def group(self) -> str:
        if not self.trains:
            return "decoding"
        return "causal" if self.window is None else "window"

    @property
    def sight(self) -> Sight:
        if self.window is not None:
            return Told(window=(self.window, 0))
        return Told(is_causal=self.trains)

    @property
    def name(self) -> str:
        kind = "causal" if self.window is None else f"window {self.window + 1}"
        length = f"T={self.T}" if self.trains else f"T={self.T} after S={self.S}"
        return f"{kind if self.trains else f'decoding, {kind}'}, B={self.B} {length}"

    @property
    def scores(self) -> int:
        return self.B * self.H * self.T * self.S

    @property
    def flops(self) -> int:
        """Of the forward: two products of a multiplication and an addition for each pair that is seen."""
        past = self.S - self.T
        left = self.S if self.window is None else self.window + 1
        pairs = sum(min(left, past + t + 1) for t in range(self.T))
        return 4 * self.B * self.H * self.C * pairs


SHAPES = (
    Shape(B=8, T=4096, S=4096),
    Shape(B=1, T=32768, S=32768),
    Shape(B=1, T=32768, S=32768, window=1023),
    Shape(B=1, T=1, S=32768),
    Shape(B=64, T=1, S=2048),
)


@dataclass(frozen=True)
class Given:
    """Tensors of a shape, and what the naive backend makes of them in float32: out, and gradients if it trains."""

    q_BTHC: Tensor
    k_BSGC: Tensor
    v_BSGC: Tensor
    dout_BTHC: Tensor
    expected: tuple[Tensor, ...]

    @classmethod
    def draw(cls, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> Given:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device).to(dtype)

        q_BTHC, dout_BTHC = normal(shape.B, shape.T, shape.H, shape.C), normal(shape.B, shape.T, shape.H, shape.C)
        k_BSGC, v_BSGC = normal(shape.B, shape.S, shape.G, shape.C), normal(shape.B, shape.S, shape.G, shape.C)
        tensors = (q_BTHC, k_BSGC, v_BSGC)
        if shape.trains:
            for tensor in tensors:
                tensor.requires_grad_()
        return cls(*tensors, dout_BTHC, _reference(shape, *tensors, dout_BTHC))

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_BTHC, self.k_BSGC, self.v_BSGC


def _reference(shape: Shape, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """The naive backend in float32, some queries at a time."""
    q, k, v = (x.detach().float().requires_grad_(shape.trains) for x in (q, k, v))
    rows = max(1, CHUNK // (shape.scores // shape.T))
    outs = []
    for start in range(0, shape.T, rows):
        end = min(start + rows, shape.T)
        seen = shape.S - shape.T + end  # causality ends the keys here
        sight = Told(window=(shape.window if shape.window is not None else -1, 0))
        mask_BTS = dense_mask(sight, end - start, seen, q.device)
        out = attention_naive(q[:, start:end], k[:, :seen], v[:, :seen], Told(mask_BTS))
        if shape.trains:
            out.backward(dout[:, start:end].float())
        outs.append(out.detach())
    gradients = (x.grad for x in (q, k, v)) if shape.trains else ()
    return torch.cat(outs, dim=1), *(x for x in gradients if x is not None)
