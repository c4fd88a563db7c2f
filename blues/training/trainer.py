"""The training loop.

In: a model, a `Mixture` of training data and one of validation data, and the place where the run lies.
Out: weights, checkpoints, and events (training and validation metrics) handed to whoever listens.
"""

from __future__ import annotations

from blues import config as cfg
from blues.errors import ConfigError
from blues.training.optim import AdamW, Cosine, Optimizer, Schedule
from blues.training.parallel import Parallel, Precision


class Trainer(cfg.Configurable):
    """Trains one model on one mixture."""

    @cfg.configclass
    class Config(cfg.Config):
        """The length of the run, the batch, and what happens every so many steps.

        steps: updates in all. global_batch_size: sequences per update over all workers; micro_batch_size: sequences
        per worker and forward pass (the rest is accumulated). gradient_clipping: largest global gradient norm, 0 for
        none. precision: `auto` is bf16 with fp32 master weights where the device has it, else fp32. log_every,
        validate_every, checkpoint_every: in steps, 0 for never (the last step always gets all three).
        validation_samples: sequences of the validation split, always the same. keep_checkpoints: newest ones that
        stay. max_failures: restarts of the workers after a crash before the run gives up. seed: of the weights and of
        the router noise.
        """

        steps: int = 10_000
        global_batch_size: int = 256
        micro_batch_size: int = 8
        optimizer: Optimizer.Config = AdamW.Config()
        schedule: Schedule.Config = Cosine.Config()
        gradient_clipping: float = 1.0
        precision: Precision = "auto"
        parallel: Parallel.Config = Parallel.Config()
        log_every: int = 10
        validate_every: int = 500
        validation_samples: int = 256
        checkpoint_every: int = 500
        keep_checkpoints: int = 2
        max_failures: int = 3
        seed: int = 0

        def __post_init__(self) -> None:
            for name in ("steps", "global_batch_size", "micro_batch_size", "keep_checkpoints"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
            for name in ("log_every", "validate_every", "validation_samples", "checkpoint_every", "max_failures"):
                if getattr(self, name) < 0:
                    raise ConfigError(f"{name} must be >= 0, got {getattr(self, name)}")
            if self.gradient_clipping < 0:
                raise ConfigError(f"gradient_clipping must be >= 0 (0 for none), got {self.gradient_clipping}")
            at_once = self.micro_batch_size * self.parallel.num_workers
            if self.global_batch_size % at_once:
                raise ConfigError(
                    f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                    f"{self.micro_batch_size} x parallel.num_workers {self.parallel.num_workers}; nearest that fits: "
                    f"{max(1, round(self.global_batch_size / at_once)) * at_once}"
                )

        @property
        def accumulation(self) -> int:
            """Forward passes per worker and update."""
            return self.global_batch_size // (self.micro_batch_size * self.parallel.num_workers)

    config: Config
