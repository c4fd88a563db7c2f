"""Named experiments: functions that return an `Experiment`.

In: a name (or a YAML file) and dotted overrides. Out: the validated tree. A new experiment is a new function here with
`@experiment`; derive it from another with `replace` or `override`, and every command knows its name at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from blues import config as cfg
from blues.config import nearest
from blues.data.mixture.batches import Mixture
from blues.data.tokenizer import Tokenizer
from blues.errors import ConfigError
from blues.experiment import Experiment
from blues.inference.sampling import Sampling
from blues.model.attention.layer import Attention
from blues.model.moe.layer import MoE
from blues.model.moe.routers import NoisyTopK
from blues.model.transformer import Transformer
from blues.training.optim import AdamW, Cosine
from blues.training.parallel import Parallel
from blues.training.trainer import Trainer

EXPERIMENTS: dict[str, Callable[[], Experiment]] = {}
"""Every named experiment."""


def experiment(function: Callable[[], Experiment]) -> Callable[[], Experiment]:
    """Register a function under its own name."""
    EXPERIMENTS[function.__name__] = function
    return function


def resolve(name: str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of this name, or of this YAML file (a run's experiment.yaml), with `path.to.key=value` changes.

    Raises:
        ConfigError: an unknown name or key (with the nearest), a value that does not fit, a file that cannot be read.
    """
    if name in EXPERIMENTS:
        chosen = EXPERIMENTS[name]()
    elif name.endswith((".yaml", ".yml")):
        chosen = cfg.read(Experiment, name)
    elif (Path(name) / "experiment.yaml").is_file():
        chosen = cfg.read(Experiment, Path(name) / "experiment.yaml")
    elif "=" in name:
        raise ConfigError(f"expected an experiment before the override {name!r}; there are: {', '.join(EXPERIMENTS)}")
    else:
        raise ConfigError(f"unknown experiment {name!r} (a YAML file ends in .yaml).{nearest(name, EXPERIMENTS)}")
    return chosen.override(cfg.parse_overrides(overrides))


@experiment
def blues01() -> Experiment:
    """Blues-01: 12 layers of width 768, every other one a mixture of 8 experts, on the whole o200k_base vocabulary."""
    return Experiment(
        name="blues01",
        data=Mixture.Config(sequence_length=2048),
        model=Transformer.Config(
            vocab_size=200_064,
            dim=768,
            num_layers=12,
            max_seq_len=2048,
            attention=Attention.Config(num_heads=12, num_kv_heads=1, head_dim=64, qk_norm=True),
            ffn_dim=2048,
            moe=MoE.Config(
                num_experts=8,
                top_k=2,
                ffn_dim=2048,
                every=2,
                router=NoisyTopK.Config(),
                load_balancing_weight=0.01,
                router_z_weight=0.001,
            ),
            tie_embeddings=True,
        ),
        training=Trainer.Config(
            steps=20_000,
            global_batch_size=256,
            micro_batch_size=8,
            optimizer=AdamW.Config(lr=6e-4),
            schedule=Cosine.Config(warmup_steps=1000),
        ),
    )


@experiment
def tiny() -> Experiment:
    """The same architecture at a size that trains on two CPU cores in two minutes."""
    return Experiment(
        name="tiny",
        data=Mixture.Config(sequence_length=256, tokenizer=Tokenizer.Config(vocab_size=4096)),
        model=Transformer.Config(
            vocab_size=4096,
            dim=128,
            num_layers=4,
            max_seq_len=256,
            attention=Attention.Config(num_heads=4, num_kv_heads=1, head_dim=32),
            ffn_dim=384,
            moe=MoE.Config(num_experts=4, top_k=2, ffn_dim=256, router=NoisyTopK.Config()),
        ),
        training=Trainer.Config(
            steps=500,
            global_batch_size=8,
            micro_batch_size=4,
            optimizer=AdamW.Config(lr=3e-3),
            schedule=Cosine.Config(warmup_steps=50),
            precision="fp32",
            parallel=Parallel.Config(num_workers=2, device="cpu"),
            log_every=10,
            validate_every=100,
            validation_samples=64,
            checkpoint_every=100,
        ),
        inference=Sampling.Config(max_length=96),
    )
