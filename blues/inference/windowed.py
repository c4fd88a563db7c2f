"""A key-value cache whose memory does not grow: tokens that no layer can see any more are dropped.

In: each layer's new `k_BTGC, v_BTGC`. Out: the keys and values that are still in sight, `k_BSGC, v_BSGC`.

Positions count from the first token held. That changes nothing: keys lie in the cache unrotated, rotary scores depend
on distances alone (RoFormer, arXiv 2104.09864), and so does a sliding window. A stream may so go on without end, at
positions that stay small. Where it would change something, the cache is refused: layers that see everything, sinks
(whose distance grows), and ropes that go by the length.

Legend: L layers, B rows, T new tokens, S tokens in sight, G KV heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blues.errors import ConfigError
from blues.model.attention.patterns import AttentionPattern
from blues.model.rope import DynamicNTK, LongRoPE
from blues.model.transformer import Transformer


def reach(config: Transformer.Config) -> int:
    """How many tokens back the layer that sees furthest looks.

    Raises:
        ConfigError: the model needs tokens from further back than any window, or their places in the whole text.
    """
    if isinstance(config.attention.rope, DynamicNTK.Config | LongRoPE.Config):
        raise ConfigError(
            f"a windowed cache forgets the length of the text, and attention.rope={config.attention.rope._variant} "
            "rotates by it; use blues.inference.cache.Cache"
        )
    if config.depth is not None:
        raise ConfigError("a windowed cache does not know which tokens a block left out (depth); use Cache")
    furthest = 0
    for layer in range(config.num_layers):
        pattern: AttentionPattern = config.attention.for_layer(layer).pattern.build()
        window = pattern.window()
        if window is None or window[0] < 0:
            raise ConfigError(
                "a windowed cache needs a plain window in every layer, and attention.pattern="
                f"{pattern.config._variant} of layer {layer} may see any token before; use blues.inference.cache.Cache"
            )
        furthest = max(furthest, window[0])
    return furthest


class WindowedCache:
    """Holds the last `reach` tokens and those of the running forward; implements `KVCache`.

    Rows have equally many tokens. What the routers of `document_pools` remember is not kept, and they say so.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        rows: int,
        num_kv_heads: int,
        head_dim: int,
        reach: int,
        chunk: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """`reach`: see the function of that name. `chunk`: the most tokens of one forward."""
        self.reach, self.chunk = reach, chunk
        # Room for many single tokens as well, so that dropping (a copy of what is in sight) is rare.
        shape = (num_layers, rows, reach + max(chunk, reach), num_kv_heads, head_dim)
        self.k_LBSGC = torch.zeros(shape, dtype=dtype, device=device)
        self.v_LBSGC = torch.zeros(shape, dtype=dtype, device=device)
        self.seen = 0
        """Tokens read in all."""
        self._held = 0

    @property
    def length(self) -> int:
        """Tokens held: the next one is at this position."""
        return self._held

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors; constant."""
        return 2 * self.k_LBSGC.numel() * self.k_LBSGC.element_size()

    def update(self, layer: int, k_BTGC: Tensor, v_BTGC: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.update`.

        Raises:
            ValueError: more than `chunk` tokens at once.
        """
        new = k_BTGC.shape[1]
        if new > self.chunk:
            raise ValueError(f"{new} tokens at once, but the cache was made for {self.chunk}; read them in chunks")
        end = self._held + new
        self.k_LBSGC[layer, :, self._held : end] = k_BTGC
        self.v_LBSGC[layer, :, self._held : end] = v_BTGC
        return self.k_LBSGC[layer, :, :end], self.v_LBSGC[layer, :, :end]

    def advance(self, counts: Sequence[int]) -> None:
        """After a forward pass of `counts[b]` tokens in row b; makes room for the next.

        Raises:
            ValueError: rows of different length.
        """
        if len(set(counts)) > 1:
            raise ValueError("the rows of a windowed cache have equally many tokens; use one for each row")
        self._held += counts[0]
        self.seen += counts[0]
        if self._held + self.chunk > self.k_LBSGC.shape[2]:
            first = self._held - self.reach
            for x_LBSGC in (self.k_LBSGC, self.v_LBSGC):
                x_LBSGC[:, :, : self.reach] = x_LBSGC[:, :, first : self._held].clone()
            self._held = self.reach
