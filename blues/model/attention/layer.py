"""The attention layer: project, normalize, rotate, attend, project.

In: the residual stream after its norm, a `View` (who sees whom, made once per forward for all layers), and optionally a
KV cache. Out: the layer's addition to the residual stream.

One matrix makes queries, keys and values; with one KV head this is multi-query attention (arXiv 1911.02150). QK-norm is
an RMSNorm over each head's channels with one weight for all heads, as in Qwen3.

Legend: B batch, T new tokens, S all tokens, D width, H query heads, G KV heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from blues import config as cfg
from blues.errors import ConfigError
from blues.kernels.attention import Form
from blues.model.attention.backends import Attend, Backend
from blues.model.attention.masks import BlockMasks, block_mask_of_tokens, positions_within_documents
from blues.model.attention.patterns import AdaptiveWindow, AttentionPattern, Causal, TokenTree, pairs_of
from blues.model.attention.precision import Wanted
from blues.model.attention.span import LearnedSpan
from blues.model.layers import Linear, RMSNorm
from blues.model.rope import NoPE, PlainRotary, RotaryEmbedding, Rotation, rotate

WITHOUT_BIAS = ("flex", "flash2", "flash4", "sdpa_flash", "sdpa_cudnn")
"""Backends that read no bias, or give it no gradient, on any device."""


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
    """What the attention layers of one forward share that have the same pattern and rotation.

    How queries see keys is given in one or more of the forms of `blues.kernels.attention.Sight`.
    """

    query_rotation: Rotation | None
    """None: queries and keys are not rotated."""
    key_rotation: Rotation | None
    mask_BTS: Tensor | None
    """(B, T, S), or (B, H, T, S) where heads differ."""
    is_causal: bool
    block_mask: BlockMask | None = None
    window: tuple[int, int] | None = None
    query_positions_BT: Tensor | None = None
    key_positions_BS: Tensor | None = None


class Places(NamedTuple):
    """Where the tokens of a forward stand."""

    query_positions_BT: Tensor
    key_positions_BS: Tensor
    follows: bool
    """Whether the queries are the last of the keys, position by position, the first key being at 0."""
    is_whole: bool
    """Whether queries and keys are the same tokens."""
    documents_BT: Tensor | None
    tree: TokenTree | None
    length: int | None
    """Above every position; None if only the device knows."""


def make_view(
    rope: RotaryEmbedding | None,
    pattern: AttentionPattern,
    *,
    length: int,
    device: torch.device,
    past: int | None = None,
    positions_BT: Tensor | None = None,
    documents_BT: Tensor | None = None,
    tree: TokenTree | None = None,
    num_heads: int = 1,
    block_masks: BlockMasks | None = None,
) -> View:
    """The view of `length` new tokens.

    Args:
        past: tokens in the cache, or None without a cache. With a cache the keys are at positions 0..past+length-1.
        positions_BT: positions of the new tokens; by default they follow the cache.
        documents_BT: numbers; a token sees only those of its own number. Positions need not start anew with every
            document: rotary scores depend on distances alone, and patterns count from each document's first token.
        tree: of all tokens, those in the cache included, for patterns that ask for one.
        num_heads: query heads, for patterns in which they differ.
        block_masks: given to backends that read block masks; dense masks are then made only where a block mask cannot
            say it.

    Raises:
        ValueError: documents together with a cache, which does not know the numbers of the tokens it holds; a tree of
            another number of tokens.
        ConfigError: no tree where the pattern needs one.
    """
    views = make_views(
        [(rope, pattern)],
        length=length,
        device=device,
        past=past,
        positions_BT=positions_BT,
        documents_BT=documents_BT,
        tree=tree,
        num_heads=num_heads,
        block_masks=block_masks,
    )
    return views[0]


def make_views(
    layers: Sequence[tuple[RotaryEmbedding | None, AttentionPattern]],
    *,
    length: int,
    device: torch.device,
    past: int | None = None,
    positions_BT: Tensor | None = None,
    documents_BT: Tensor | None = None,
    tree: TokenTree | None = None,
    num_heads: int = 1,
    block_masks: BlockMasks | None = None,
) -> list[View]:
    """The view of each layer, given its rotation (None for none) and pattern: one object for each distinct pair.

    Other arguments and errors as in `make_view`.
    """
    places = _places(length, device, past, positions_BT, documents_BT, tree)
    rotations: dict[RotaryEmbedding | None, tuple[Rotation | None, Rotation | None]] = {None: (None, None)}
    sights: dict[AttentionPattern, View] = {}
    views: dict[tuple[RotaryEmbedding | None, AttentionPattern], View] = {}
    for rope, pattern in layers:
        if rope is not None and rope not in rotations:
            queries = rope(places.query_positions_BT, places.length)
            rotations[rope] = queries, queries if places.is_whole else rope(places.key_positions_BS, places.length)
        if pattern not in sights:
            sights[pattern] = _sight(pattern, places, num_heads, block_masks)
        if (rope, pattern) not in views:
            query_rotation, key_rotation = rotations[rope]
            views[rope, pattern] = sights[pattern]._replace(query_rotation=query_rotation, key_rotation=key_rotation)
    return [views[layer] for layer in layers]


def _places(
    length: int,
    device: torch.device,
    past: int | None,
    positions_BT: Tensor | None,
    documents_BT: Tensor | None,
    tree: TokenTree | None,
) -> Places:
    if documents_BT is not None and past is not None:
        raise ValueError("documents cannot be told apart in a KV cache; give each its own row, or no cache")
    start = past or 0
    follows = positions_BT is None
    if positions_BT is None:
        positions_BT = torch.arange(start, start + length, device=device)[None]
    is_whole = past is None or (follows and past == 0)
    keys_BS = positions_BT if is_whole else torch.arange(start + length, device=device)[None]
    if tree is not None and any(x_BS.shape[1] != keys_BS.shape[1] for x_BS in tree):
        raise ValueError(
            f"tree: has {tree.tin_BS.shape[1]} and {tree.tout_BS.shape[1]} tokens per row, needs one for each of the "
            f"{keys_BS.shape[1]} tokens so far, those in the cache included"
        )
    known = None if past is None and not follows else start + length
    return Places(positions_BT, keys_BS, follows, is_whole, documents_BT, tree, known)


def _sight(pattern: AttentionPattern, places: Places, num_heads: int, block_masks: BlockMasks | None) -> View:
    """How queries see keys, without the rotation."""
    if pattern.needs_tree and places.tree is None:
        raise ConfigError(
            "attention.pattern: prefix_syntax needs a tree of the tokens, and none came with them; pass "
            "tree=TokenTree(...) to the model, or choose another pattern"
        )
    queries_BT, keys_BS = places.query_positions_BT, places.key_positions_BS
    T, S = queries_BT.shape[1], keys_BS.shape[1]
    view = View(None, None, None, False, query_positions_BT=queries_BT, key_positions_BS=keys_BS)
    plain = places.follows and places.documents_BT is None
    window = pattern.window() if plain else None
    if window is not None and (window[0] < 0 or window[0] >= S - 1):  # as far as there are keys
        if T in (1, S):  # the newest token sees everything
            return view._replace(is_causal=T == S and T > 1)
        window = (-1, 0)
    view = view._replace(window=window)
    if block_masks is not None and not pattern.is_soft:
        if places.is_whole and plain and places.tree is None:
            return view._replace(block_mask=block_masks.get(pattern, T, queries_BT.device, num_heads))
        if window is not None:
            return view
        if places.is_whole:
            within_BT = _within_documents(queries_BT, places.documents_BT)
            block_mask = block_mask_of_tokens(pattern, within_BT, num_heads, places.documents_BT, places.tree)
            return view._replace(block_mask=block_mask)
    return view._replace(mask_BTS=_dense_mask(pattern, places, num_heads))


def _within_documents(positions_BT: Tensor, documents_BT: Tensor | None) -> Tensor:
    return positions_BT if documents_BT is None else positions_within_documents(positions_BT, documents_BT)


def _dense_mask(pattern: AttentionPattern, places: Places, num_heads: int) -> Tensor:
    """(B, T, S), or (B, H, T, S) where heads differ."""
    queries_BT = _within_documents(places.query_positions_BT, places.documents_BT)
    pairs = pairs_of(
        queries_BT,
        queries_BT if places.is_whole else places.key_positions_BS,
        num_heads,
        documents_BT=places.documents_BT,
        tree=places.tree,
        query_slots_BT=None if places.is_whole else places.query_positions_BT,
    )
    mask_BHTS = pattern.element(pairs)
    return mask_BHTS[:, 0] if mask_BHTS.shape[1] == 1 else mask_BHTS


class SequenceSplit(Protocol):
    """How several workers share a sequence, each with a slice of its tokens (`blues.training.sequence_parallel`)."""

    def make_views(
        self,
        layers: Sequence[tuple[RotaryEmbedding | None, AttentionPattern]],
        *,
        length: int,
        device: torch.device,
        past: int | None = None,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        tree: TokenTree | None = None,
        num_heads: int = 1,
        block_masks: BlockMasks | None = None,
    ) -> list[View]:
        """As the function `make_views`, for what the layers of a slice need."""
        ...

    def sum_counts(self, counts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Each of these tensors, added up over the slices."""
        ...


class Attention(nn.Module, cfg.Configurable):
    """Grouped- or multi-query attention with rotary positions and optional QK-norm."""

    @cfg.configclass
    class Config(cfg.Config):
        num_heads: int = 12
        num_kv_heads: int = 1
        head_dim: int = 64
        qk_norm: bool = True
        rope: RotaryEmbedding.Config = PlainRotary.Config()
        rope_layers: str = "R"
        """Which layers rotate: a cycle of R (yes) and N (no: NoPE), e.g. RRRN (RNoPE, arXiv 2501.18795)."""
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
            if set(self.rope_layers) - {"R", "N"} or "R" not in self.rope_layers:
                raise ConfigError(
                    f"rope_layers: must be a cycle of R and N with an R in it, e.g. RRRN, got {self.rope_layers!r}; "
                    "rope=nope rotates no layer"
                )
            if isinstance(self.rope, NoPE.Config) and self.rope_layers != "R":
                raise ConfigError(f"rope_layers: {self.rope_layers} has no meaning with rope=nope; leave it at R")
            if self.backend in WITHOUT_BIAS and self.pattern.build().is_soft:
                raise ConfigError(
                    f"backend: {self.backend} has no gradient to the learned spans of pattern=adaptive_window; set it "
                    "to auto"
                )

        def for_layer(self, layer: int) -> Attention.Config:
            """The settings of this layer (from 0): its own pattern and rope in the place of those for all layers."""
            rotates = self.rope_layers[layer % len(self.rope_layers)] == "R"
            return self.replace(
                pattern=self.pattern.build().for_layer(layer).config,
                rope=self.rope if rotates else NoPE.Config(),
                rope_layers="R",
            )

        def reads_block_masks(self, device: torch.device) -> bool:
            """Whether attention on `device` may run on FlexAttention, which reads block masks."""
            return self.backend == "flex" or (self.backend == "auto" and device.type == "cuda")

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
        self.pattern: AttentionPattern = config.pattern.build()
        self.rotates = not isinstance(config.rope, NoPE.Config)
        self.span: LearnedSpan | None = None
        if isinstance(config.pattern, AdaptiveWindow.Config):
            self.span = LearnedSpan(config.pattern, config.num_heads)
        self.attend = Attend(
            config.backend,
            config.precision,
            head_dim=config.head_dim,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
        )

    def form(self, device: torch.device) -> Form:
        """How this layer's attention is told who sees whom, in a forward without a cache."""
        if self.pattern.is_soft:
            return "bias"
        if self.pattern.window() is not None:
            return "causal" if self.pattern.plain_causal else "window"
        return "block_mask" if self.config.reads_block_masks(device) else "mask"

    def forward(
        self,
        x_BTD: Tensor,
        view: View,
        cache: KVCache | None = None,
        layer: int = 0,
        keys_BTD: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D). `layer` is this layer's number in the cache. `keys_BTD`: the tokens whose keys and
        values are new, where they are others than those that ask."""
        config = self.config
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        if keys_BTD is None:
            x_BTHC = rearrange(self.qkv(x_BTD), "b t (heads c) -> b t heads c", c=config.head_dim)
            q_BTHC, k_BTGC, v_BTGC = x_BTHC.split(heads, dim=2)
            if self.key_norm is not None:
                k_BTGC = self.key_norm(k_BTGC)
        else:
            weight_QD = self.qkv.weight[: config.num_heads * config.head_dim]
            q_BTHC = rearrange(F.linear(x_BTD, weight_QD), "b t (heads c) -> b t heads c", c=config.head_dim)
            k_BTGC, v_BTGC = self.keys_and_values(keys_BTD)
        if self.query_norm is not None:
            q_BTHC = self.query_norm(q_BTHC)
        k_BSGC, v_BSGC = (k_BTGC, v_BTGC) if cache is None else cache.update(layer, k_BTGC, v_BTGC)
        if view.query_rotation is not None and view.key_rotation is not None:
            q_BTHC, k_BSGC = rotate(q_BTHC, view.query_rotation), rotate(k_BSGC, view.key_rotation)
        if self.span is not None:
            view = view._replace(mask_BTS=self._bias(self.span, view))
        out_BTHC = self.attend(q_BTHC, k_BSGC, v_BSGC, view)
        return self.output(rearrange(out_BTHC, "b t h c -> b t (h c)"))

    def keys_and_values(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """`k_BTGC, v_BTGC` as they go into a cache, of tokens that do not ask."""
        weight_KD = self.qkv.weight[self.config.num_heads * self.config.head_dim :]
        x_BTGC = rearrange(F.linear(x_BTD, weight_KD), "b t (groups c) -> b t groups c", c=self.config.head_dim)
        k_BTGC, v_BTGC = x_BTGC.chunk(2, dim=2)
        return (k_BTGC if self.key_norm is None else self.key_norm(k_BTGC)), v_BTGC

    def _bias(self, span: LearnedSpan, view: View) -> Tensor:
        """`bias_BHTS` of the learned spans, among the keys that the view shows."""
        assert view.query_positions_BT is not None and view.key_positions_BS is not None
        assert view.mask_BTS is not None and view.mask_BTS.ndim == 3  # compositions by head refuse soft patterns
        return span(view.query_positions_BT, view.key_positions_BS, view.mask_BTS)
