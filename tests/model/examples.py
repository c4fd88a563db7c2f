"""Small models for tests: every part is there, nothing is big."""

from __future__ import annotations

import torch

from blues.model.attention.layer import Attention
from blues.model.moe.layer import MoE
from blues.model.transformer import Transformer


def small(**changes) -> Transformer.Config:
    """Four layers, mixtures in the second and fourth, 4 heads on 1 KV head; `path=value` overrides (dots as __)."""
    config = Transformer.Config(
        vocab_size=97,
        dim=32,
        num_layers=4,
        max_seq_len=64,
        ffn_dim=48,
        attention=Attention.Config(num_heads=4, num_kv_heads=1, head_dim=8),
        moe=MoE.Config(num_experts=4, top_k=2, ffn_dim=24),
    )
    return config.override({path.replace("__", "."): value for path, value in changes.items()})


def lively(model: Transformer, seed: int = 0, std: float = 0.2) -> Transformer:
    """Draw all weights anew and larger (norms around 1), so that every part matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=std, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return model


def tokens(model: Transformer, batch: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    """`tokens_BT`, uniformly drawn."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    """The gradient of every parameter by name; fails if one has none."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad.clone()
    return found
