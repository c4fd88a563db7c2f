"""From a folder on disk to a model that can be asked.

In: a run folder, one of its checkpoints, or a folder that `blues export` wrote. Out: `LoadedModel`: the model in
evaluation mode, its tokenizer, and what the run recorded. Nothing in these folders is executed: weights are
safetensors, settings are YAML and JSON.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from blues import config as cfg
from blues.data.tokenizer import NUM_RANKS, Tokenizer
from blues.errors import CheckpointError, ConfigError
from blues.inference.cache import Cache
from blues.inference.sampling import Sampling
from blues.model.huggingface import import_huggingface
from blues.model.transformer import Transformer
from blues.training.checkpoint import read_checkpoint

Precision = Literal["auto", "fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for use. `tree` is the run's whole recorded configuration (empty for an export)."""

    model: Transformer
    tokenizer: Tokenizer
    config: Transformer.Config
    path: Path
    step: int | None = None
    tree: Mapping[str, Any] = field(default_factory=dict, repr=False)
    sampling: Sampling.Config = Sampling.Config()
    """The run's own sampling settings, the defaults of every generation."""

    @property
    def max_seq_len(self) -> int:
        """Tokens that the model sees at once."""
        return self.config.max_seq_len

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @functools.cached_property
    def num_active_parameters(self) -> int:
        """Parameters that one token uses."""
        return self.model.num_active_parameters()

    @functools.cached_property
    def allowed_V(self) -> Tensor:
        """Bool, one for each of the model's `vocab_size` rows: ids that stand for bytes, and the end-of-text token.

        False for the padding of the vocabulary and for o200k_base's unused and chat ids, which no training text
        contains.
        """
        allowed_V = torch.arange(self.config.vocab_size, device=self.device) < min(NUM_RANKS, self.tokenizer.n_vocab)
        allowed_V[self.tokenizer.eot_id] = True
        return allowed_V

    def make_cache(self, rows: int, capacity: int) -> Cache:
        """An empty KV cache for `rows` texts of about `capacity` tokens."""
        return Cache(
            num_layers=self.config.num_layers,
            rows=rows,
            num_kv_heads=self.config.attention.num_kv_heads,
            head_dim=self.config.attention.head_dim,
            capacity=capacity,
            dtype=next(self.model.parameters()).dtype,
            device=self.device,
        )


def load_model(path: str | Path, device: str = "auto", precision: Precision = "auto") -> LoadedModel:
    """Load a run folder (its newest good checkpoint), a checkpoint folder, or an export of `blues export`.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        precision: of the weights; "auto" is bf16 on a GPU that has it and fp32 elsewhere.

    Raises:
        CheckpointError: missing, damaged, or of another shape than its own configuration says.
        ConfigError: a device that this machine does not have.
    """
    path = Path(path).expanduser()
    target = choose_device(device)
    dtype = choose_dtype(precision, target)
    if (path / "config.json").is_file():
        return _load_export(path, target, dtype)
    checkpoint = read_checkpoint(path)
    tree = checkpoint.tree
    try:
        config = cfg.load(Transformer.Config, tree["model"], "model")
        tokenizer = cfg.load(Tokenizer.Config, tree["data"]["tokenizer"], "data.tokenizer")
        sampling = cfg.load(Sampling.Config, tree.get("inference", {}), "inference")
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the settings in {str(checkpoint.path / 'experiment.yaml')!r} do not describe a model this Blues knows: "
            f"{error}; use the Blues version that trained it"
        ) from None
    model = _build(config)
    checkpoint.check_shapes(model, tree)
    model.load_state_dict(checkpoint.load_model_state(), assign=True)
    return _assemble(model, tokenizer, config, target, dtype, checkpoint.path, checkpoint.step, tree, sampling)


def _load_export(path: Path, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    imported = import_huggingface(path)
    if imported.tokenizer is None:
        raise CheckpointError(
            f"{str(path / 'config.json')!r} names no Blues tokenizer: it was not made by `blues export`"
        )
    model = imported.config.build()
    model.load_state_dict(imported.state)
    return _assemble(model, imported.tokenizer, imported.config, device, dtype, path, None, {}, Sampling.Config())


def _build(config: Transformer.Config) -> Transformer:
    """A model without weights: drawing 200,064 rows only to overwrite them takes seconds."""
    with torch.device("meta"):
        return config.build()


def _assemble(
    model: Transformer,
    tokenizer: Tokenizer.Config,
    config: Transformer.Config,
    device: torch.device,
    dtype: torch.dtype,
    path: Path,
    step: int | None,
    tree: Mapping[str, Any],
    sampling: Sampling.Config,
) -> LoadedModel:
    built = tokenizer.build()
    if built.n_vocab > config.vocab_size:
        raise CheckpointError(
            f"{str(path)!r} has {config.vocab_size:,} rows of embeddings for a tokenizer of {built.n_vocab:,} ids; "
            f"its model and its tokenizer do not belong together"
        )
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return LoadedModel(model, built, config, path, step, tree, sampling)


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" is a GPU if there is one.

    Raises:
        ConfigError: a name torch does not know, or a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device {name!r} cannot be used here ({reason}); use --device cpu or auto") from None
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the weights; see `load_model`."""
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    if precision not in DTYPES:
        raise ConfigError(f"unknown precision {precision!r}.{cfg.nearest(precision, ['auto', *DTYPES])}")
    return DTYPES[precision]
