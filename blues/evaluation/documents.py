"""The loss of a model on a document of any length, with memory for a chunk of it.

In: a model and the document's tokens. Out: nats per token, as of one whole forward.

Legend: T tokens of the document, c tokens of a chunk, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blues.errors import ConfigError
from blues.inference.cache import Cache
from blues.inference.windowed import WindowedCache, reach
from blues.kernels.linear_cross_entropy import linear_cross_entropy_chunked
from blues.model.transformer import Transformer


def make_cache(model: Transformer, length: int, chunk: int) -> Cache | WindowedCache:
    """The smallest cache that one text of `length` tokens, read in chunks, can go through."""
    attention, weight = model.config.attention, model.embedding.weight
    sizes = {
        "num_layers": model.config.num_layers,
        "rows": 1,
        "num_kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
    }
    try:
        window = reach(model.config)
    except ConfigError:  # something sees everything: all is kept
        return Cache(**sizes, capacity=length, dtype=weight.dtype, device=weight.device)
    return WindowedCache(**sizes, reach=window, chunk=chunk, dtype=weight.dtype, device=weight.device)


@torch.inference_mode()
def document_loss(model: Transformer, tokens_T: Tensor, *, chunk: int = 512) -> float:
    """Mean nats per token after the first; exp of it is the perplexity.

    Activations are those of `chunk` tokens. Keys and values of the whole document are kept, or those in sight where
    every layer has a plain window: memory is then flat in the length. Ropes that go by the length (dynamic NTK,
    LongRoPE) rotate each chunk by the length read so far, as in generation.

    Raises:
        ConfigError: fewer than two tokens.
    """
    length = len(tokens_T) - 1
    if length < 1:
        raise ConfigError("a document needs two tokens at least: the first is not predicted")
    cache = make_cache(model, length, chunk)
    weight_VD = model.embedding.weight if model.head is None else model.head.weight
    total, training = 0.0, model.training
    model.eval()
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        x_1cD, _ = model.hidden(tokens_T[None, start:end], cache=cache)
        cache.advance([end - start])
        mean = linear_cross_entropy_chunked(x_1cD[0], weight_VD, tokens_T[start + 1 : end + 1])
        total += float(mean) * (end - start)
    model.train(training)
    return total / length
