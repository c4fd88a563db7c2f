"""The attention layer: project, normalize, rotate, attend, project.

In: the residual stream after its norm, a `View` (who sees whom, made once per forward for all layers), and optionally a
KV cache. Out: the layer's addition to the residual stream.

One matrix makes queries, keys and values; with one KV head this is multi-query attention (arXiv 1911.02150). QK-norm is
an RMSNorm over each head's channels with one weight for all heads, as in Qwen3.

Legend: B batch, T new tokens, S all tokens, D width, H query heads, G KV heads, C channels of a head.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from blues import config as cfg
from blues.errors import ConfigError
from blues.model.attention.backends import Attend, Backend
from blues.model.attention.patterns import AttentionPattern, Causal
from blues.model.attention.precision import Wanted
from blues.model.layers import Linear, RMSNorm
from blues.model.rope import PlainRotary, RotaryEmbedding, Rotation, rotate


class KVCache(Protocol):
    """Keys (unrotated) and values of the tokens read so far. Slot j of a row holds that row's token at position j."""

    @property
    def length(self) -> int:
        """Tokens held before this forward by the longest row; the same for every layer."""
        ...

    def update(self, layer: int, k_BTGC: Tensor, v_BTGC: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; return all of them, `k_BSGC, v_BSGC` with S = length + T."""
        ...


class View(NamedTuple):
    """What the attention layers of one forward share."""

    query_rotation: Rotation
    key_rotation: Rotation
    mask_BTS: Tensor | None
    is_causal: bool
    block_mask: BlockMask | None = None
    window: tuple[int, int] | None = None


def make_view(
    rope: RotaryEmbedding,
    pattern: AttentionPattern,
    *,
    length: int,
    device: torch.device,
    past: int | None = None,
    positions_BT: Tensor | None = None,
    documents_BT: Tensor | None = None,
) -> View:
    """The view of `length` new tokens.

    Args:
        past: tokens in the cache, or None without a cache. With a cache the keys are at positions 0..past+length-1.
        positions_BT: positions of the new tokens; by default they follow the cache.
        documents_BT: numbers; a token sees only those of its own number. Positions need not start anew with every
            document, because rotary scores depend on distances alone.

    Raises:
        ValueError: documents together with a cache, which does not know the numbers of the tokens it holds.
    """
    if documents_BT is not None and past is not None:
        raise ValueError("documents cannot be told apart in a KV cache; give each its own row, or no cache")
    start = past or 0
    aligned = positions_BT is None
    if positions_BT is None:
        positions_BT = torch.arange(start, start + length, device=device)[None]
    query_rotation = rope(positions_BT)
    if past is None or (aligned and past == 0):
        key_positions_BS, key_rotation = positions_BT, query_rotation
    else:
        key_positions_BS = torch.arange(start + length, device=device)[None]
        key_rotation = rope(key_positions_BS)
    if documents_BT is not None:
        same_BTS = documents_BT[:, :, None] == documents_BT[:, None, :]
        return View(query_rotation, key_rotation, pattern.mask(positions_BT, key_positions_BS) & same_BTS, False)
    if pattern.plain_causal and aligned and start == 0:
        return View(query_rotation, key_rotation, None, True)
    if pattern.plain_causal and aligned and length == 1:  # the newest token sees everything
        return View(query_rotation, key_rotation, None, False)
    return View(query_rotation, key_rotation, pattern.mask(positions_BT, key_positions_BS), False)


class Attention(nn.Module, cfg.Configurable):
    """Grouped- or multi-query attention with rotary positions and optional QK-norm."""

    @cfg.configclass
    class Config(cfg.Config):
        num_heads: int = 12
        num_kv_heads: int = 1
        head_dim: int = 64
        qk_norm: bool = True
        rope: RotaryEmbedding.Config = PlainRotary.Config()
        pattern: AttentionPattern.Config = Causal.Config()
        backend: Backend = "auto"
        precision: Wanted = "auto"

        def __post_init__(self) -> None:
            for name in ("num_heads", "num_kv_heads", "head_dim"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
            if self.num_heads % self.num_kv_heads:
                raise ConfigError(f"num_kv_heads: must divide num_heads ({self.num_heads}), got {self.num_kv_heads}")
            if self.head_dim % 2:
                raise ConfigError(f"head_dim: must be even for rotary embeddings, got {self.head_dim}")

    def __init__(
        self,
        config: Config,
        *,
        dim: int,
        norm_eps: float,
        std: float,
        output_std: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.config = config
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = Linear(dim, heads * config.head_dim, std=std, generator=generator)
        self.output = Linear(config.num_heads * config.head_dim, dim, std=output_std, generator=generator)
        self.query_norm = RMSNorm(config.head_dim, eps=norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_dim, eps=norm_eps) if config.qk_norm else None
        self.attend = Attend(
            config.backend,
            config.precision,
            head_dim=config.head_dim,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
        )

    def forward(self, x_BTD: Tensor, view: View, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """(B, T, D) -> (B, T, D). `layer` is this layer's number in the cache."""
        config = self.config
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        x_BTHC = rearrange(self.qkv(x_BTD), "b t (heads c) -> b t heads c", c=config.head_dim)
        q_BTHC, k_BTGC, v_BTGC = x_BTHC.split(heads, dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTHC, k_BTGC = self.query_norm(q_BTHC), self.key_norm(k_BTGC)
        k_BSGC, v_BSGC = (k_BTGC, v_BTGC) if cache is None else cache.update(layer, k_BTGC, v_BTGC)
        q_BTHC, k_BSGC = rotate(q_BTHC, view.query_rotation), rotate(k_BSGC, view.key_rotation)
        out_BTHC = self.attend(q_BTHC, k_BSGC, v_BSGC, view)
        return self.output(rearrange(out_BTHC, "b t h c -> b t (h c)"))
