"""How the work is spread: workers, devices, arithmetic, and the settings DeepSpeed gets.

In: `Parallel.Config` and the process group that a launcher made (Ray Train, or none: then one process).
Out: `Ranks` (who am I, on which device), the arithmetic type, and DeepSpeed's configuration.
"""

from __future__ import annotations

from typing import Literal

from blues import config as cfg
from blues.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16"]


class Parallel(cfg.Configurable):
    """One worker's share of the machine."""

    @cfg.configclass
    class Config(cfg.Config):
        """Where the training runs.

        num_workers: processes, one per GPU or a few per CPU machine. zero_stage: what ZeRO (arXiv 1910.02054) splits
        over the workers: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights. device: `auto` takes GPUs if
        there are any. cpus_per_worker: CPUs reserved for a worker, and its threads when it computes on them.
        """

        num_workers: int = 1
        zero_stage: int = 1
        device: Literal["auto", "cpu", "cuda"] = "auto"
        cpus_per_worker: int = 1

        def __post_init__(self) -> None:
            if self.num_workers < 1:
                raise ConfigError(f"num_workers must be >= 1, got {self.num_workers}")
            if self.zero_stage not in (0, 1, 2, 3):
                raise ConfigError(f"zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}")
            if self.cpus_per_worker < 1:
                raise ConfigError(f"cpus_per_worker must be >= 1, got {self.cpus_per_worker}")

    config: Config

    def __init__(self, config: Parallel.Config) -> None:
        self.config = config
