"""Which keys a query may see, as a kernel is told.

In: the description that a model makes once per forward. Out: the dense mask of it, for the kernels that read nothing
shorter and for the reference.

Legend: B batch (or 1), T queries, S keys, H query heads (or 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

Form = Literal["full", "causal", "window", "block_mask", "mask", "bias"]
"""How a `Sight` says it, shortest first. Kernels differ in which of these they read."""


class Sight(Protocol):
    """Any object with these four attributes, e.g. `blues.model.attention.layer.View`.

    Several may be given at once; they then say the same thing, and a kernel takes the one it is fastest with.

    mask_BTS: bool, (B, T, S) or (B, H, T, S), B and H may be 1: True where a query may see a key. A query that sees no
        key (padding) gets zeros, and no gradient flows through it. Or float: a bias that is added to the scores, -inf
        where a query may not see a key; it may have a gradient, and says more than any other form beside it.
    is_causal: with T queries and S = T keys, query t sees the keys 0..t; nothing else is given then.
    block_mask: FlexAttention's, for T queries and S keys.
    window: (left, right): the T queries are the last T of the S positions, and the query at position p sees the keys
        p - left .. p + right. -1 is no limit on that side.

    With none of them every query sees every key.
    """

    @property
    def mask_BTS(self) -> Tensor | None: ...

    @property
    def is_causal(self) -> bool: ...

    @property
    def block_mask(self) -> BlockMask | None: ...

    @property
    def window(self) -> tuple[int, int] | None: ...


AttentionFunction = Callable[[Tensor, Tensor, Tensor, Sight], Tensor]
"""`(q_BTHC, k_BSGC, v_BSGC, sight) -> out_BTHC`."""


def form_of(sight: Sight) -> Form:
    """The shortest form in which `sight` is given."""
    if sight.mask_BTS is not None and sight.mask_BTS.is_floating_point():
        return "bias"
    if sight.window is not None:
        return "window"
    if sight.is_causal:
        return "causal"
    if sight.block_mask is not None:
        return "block_mask"
    return "full" if sight.mask_BTS is None else "mask"


def window_of(sight: Sight) -> tuple[int, int]:
    """`sight` as window arguments; only for the forms full, causal and window."""
    if sight.window is not None:
        return sight.window
    return (-1, 0) if sight.is_causal else (-1, -1)


def dense_mask(sight: Sight, T: int, S: int, device: torch.device) -> Tensor | None:
    """`sight` as a mask (or bias) that broadcasts to (B, H, T, S); None where every query sees every key.

    This is the definition of all forms.
    """
    if sight.mask_BTS is not None:
        return sight.mask_BTS if sight.mask_BTS.ndim == 4 else sight.mask_BTS[:, None]
    if sight.window is None and not sight.is_causal:
        if sight.block_mask is None:
            return None
        B, H = sight.block_mask.kv_num_blocks.shape[:2]
        return create_mask(sight.block_mask.mask_mod, B, H, T, S, device=device)
    left, right = window_of(sight)
    queries_T1 = torch.arange(S - T, S, device=device)[:, None]
    keys_S = torch.arange(S, device=device)
    mask_TS = torch.ones(T, S, dtype=torch.bool, device=device)
    if left >= 0:  # sides are compared, not their difference, which would be T x S numbers of 8 bytes
        mask_TS &= keys_S >= queries_T1 - left
    if right >= 0:
        mask_TS &= keys_S <= queries_T1 + right
    return mask_TS[None, None]
