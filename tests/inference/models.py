"""Small models to test with: honest fakes whose every probability is known, and a real, tiny transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blues import config as cfg
from blues.data.tokenizer import Tokenizer
from blues.inference.loading import LoadedModel
from blues.inference.sampling import Sampling
from blues.model.attention.layer import Attention
from blues.model.losses import Losses
from blues.model.moe.layer import MoE
from blues.model.transformer import ModelOutput, Transformer
from blues.training.checkpoint import write_checkpoint

VOCAB = 300
TOKENIZER = Tokenizer.Config(vocab_size=VOCAB)
TINY = Transformer.Config(
    vocab_size=320,
    dim=32,
    num_layers=2,
    max_seq_len=48,
    attention=Attention.Config(num_heads=4, num_kv_heads=1, head_dim=8),
    ffn_dim=48,
    moe=MoE.Config(num_experts=4, top_k=2, ffn_dim=24),
    init_std=0.3,  # logits far enough apart that rounding does not decide between tokens
)


class TableModel(nn.Module):
    """Predicts the next token from the last one alone: `logits_VV[token]` are the logits of what follows it."""

    def __init__(self, logits_VV: Tensor) -> None:
        super().__init__()
        self.logits_VV = nn.Parameter(logits_VV, requires_grad=False)

    def num_active_parameters(self) -> int:
        return self.logits_VV.shape[1]

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None, *, num_logits: int | None = None, **_: Any
    ) -> ModelOutput:
        logits_BTV = self.logits_VV[tokens_BT]
        if targets_BT is None:
            start = 0 if num_logits is None else tokens_BT.shape[1] - num_logits
            return ModelOutput(logits_BTV[:, start:], None, ())
        loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
        zero = torch.zeros(())
        return ModelOutput(None, Losses(loss, loss, zero, zero, zero, zero), ())


def uniform_model(size: int = TINY.vocab_size) -> TableModel:
    """Every token is as likely as any other, always."""
    return TableModel(torch.zeros(size, size))


def wrap(model: Any, config: Transformer.Config = TINY, **fields: Any) -> LoadedModel:
    """`model` as `load_model` would give it."""
    model.eval()
    return LoadedModel(model, TOKENIZER.build(), config, Path("runs/fake"), **fields)


def tiny(seed: int = 0, **changes: Any) -> LoadedModel:
    """A real transformer of random weights."""
    config = TINY.replace(**changes)
    return wrap(config.build(seed=seed), config)


def tree_of(config: Transformer.Config = TINY, data_path: str = "") -> dict[str, Any]:
    """The part of an experiment's tree that loading reads."""
    return {
        "model": cfg.dump(config),
        "data": {"path": data_path, "tokenizer": cfg.dump(TOKENIZER)},
        "inference": cfg.dump(Sampling.Config(max_length=7)),
        "evaluation": {},
    }


def write_run(run_dir: Path, step: int = 3, seed: int = 0, data_path: str = "", tree: Any = None) -> Path:
    """A run folder with one checkpoint of a random tiny model; returns the checkpoint's folder."""
    return write_checkpoint(
        run_dir,
        step=step,
        tokens=step * 100,
        data_fingerprint="0" * 16,
        tree=tree or tree_of(data_path=data_path),
        model_state=TINY.build(seed=seed).state_dict(),
        optimizer_state={"embedding.weight/exp_avg": torch.zeros(1)},
        details={},
    )
