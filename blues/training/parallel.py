"""How the work is spread: workers, devices, arithmetic, and the settings DeepSpeed gets.

In: `Parallel.Config` and the process group that a launcher made (Ray Train, or none: then one process).
Out: `Ranks` (who am I, on which device), the arithmetic type, and DeepSpeed's configuration.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from blues import config as cfg
from blues.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16"]
REDUCE_BUCKET = 100_000_000
"""Elements that ZeRO reduces at once; DeepSpeed's default of 5e8 takes 2 GB of buffer for any model."""
ALIGNMENT = 64
"""DeepSpeed refuses buckets that are not a multiple of its alignment (2 in 0.19.8)."""


@dataclass(frozen=True)
class Ranks:
    """This worker among the others. `control` is a CPU process group for decisions, apart from the gradients."""

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup
    sequence_group: dist.ProcessGroup | None = None
    """Neighbouring workers that share each sequence; None: every worker has its own."""

    @property
    def data_rank(self) -> int:
        """Which samples of a batch are this worker's, among `data_world_size` parts."""
        return self.rank // self._sharing

    @property
    def data_world_size(self) -> int:
        """Parts of a batch: workers, or groups of workers that share each sequence."""
        return self.world_size // self._sharing

    @property
    def _sharing(self) -> int:
        return 1 if self.sequence_group is None else self.sequence_group.size()

    def any(self, flag: bool) -> bool:
        """True on every worker if `flag` is true on any. All workers call it equally often."""
        agreed = torch.tensor([int(flag)], dtype=torch.int32)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self.control)
        return bool(agreed.item())

    def from_first(self, value: Any) -> Any:
        """Rank 0's `value` on every worker (small plain values)."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        """Wait until every worker is here."""
        dist.barrier(group=self.control)


class Parallel(cfg.Configurable):
    """One worker's place: its device, its threads, its process group."""

    @cfg.configclass
    class Config(cfg.Config):
        """Where the training runs.

        num_workers: processes, one per GPU or a few per CPU machine. zero_stage: what ZeRO (arXiv 1910.02054) splits
        over the workers: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights. device: `auto` takes GPUs if
        there are any. cpus_per_worker: CPUs reserved for a worker, and its threads when it computes on them.
        sequence_parallel_size: neighbouring workers that share each sequence, a slice of its tokens each (see
        `blues.training.sequence_parallel`); 1 for whole sequences.
        """

        num_workers: int = 1
        zero_stage: int = 1
        device: Literal["auto", "cpu", "cuda"] = "auto"
        cpus_per_worker: int = 1
        sequence_parallel_size: int = 1

        def __post_init__(self) -> None:
            if self.num_workers < 1:
                raise ConfigError(f"num_workers must be >= 1, got {self.num_workers}")
            if self.zero_stage not in (0, 1, 2, 3):
                raise ConfigError(f"zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}")
            if self.cpus_per_worker < 1:
                raise ConfigError(f"cpus_per_worker must be >= 1, got {self.cpus_per_worker}")
            if self.sequence_parallel_size < 1 or self.num_workers % self.sequence_parallel_size:
                raise ConfigError(
                    f"sequence_parallel_size must be >= 1 and divide num_workers={self.num_workers} into equal "
                    f"groups, got {self.sequence_parallel_size}"
                )

        @property
        def data_parallel_size(self) -> int:
            """Workers, or groups of workers that share sequences, which read different samples."""
            return self.num_workers // self.sequence_parallel_size

    config: Config

    def __init__(self, config: Parallel.Config) -> None:
        self.config = config

    def device(self) -> torch.device:
        """This worker's device.

        Raises:
            ConfigError: CUDA was asked for and this machine has none, or fewer devices than workers.
        """
        wanted = self.config.device
        if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        local_rank, available = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= available:
            raise ConfigError(
                f"training.parallel.device is {wanted!r} but worker {local_rank} of this machine finds {available} "
                "CUDA devices; use training.parallel.device=cpu or fewer training.parallel.num_workers"
            )
        return torch.device("cuda", local_rank)

    @contextmanager
    def join(self) -> Iterator[Ranks]:
        """Join the launcher's process group, or make one of a single process; leave what was made here.

        Raises:
            ConfigError: the group has another size than `num_workers`, or there is no such device.
        """
        device = self.device()
        os.environ["DS_ACCELERATOR"] = device.type  # DeepSpeed looks at it when it is first imported
        os.environ.setdefault("LOCAL_RANK", "0")
        if device.type == "cpu":
            torch.set_num_threads(self.config.cpus_per_worker)
        else:
            torch.cuda.set_device(device)
        made = not dist.is_initialized()
        if made:
            dist.init_process_group(backend_for(device), store=dist.HashStore(), rank=0, world_size=1)
        try:
            rank, world_size = dist.get_rank(), dist.get_world_size()
            if world_size != self.config.num_workers:
                raise ConfigError(
                    f"training.parallel.num_workers is {self.config.num_workers} but {world_size} processes run"
                )
            control = dist.new_group(backend="gloo")
            yield Ranks(rank, world_size, device, control, self._sequence_group(rank, device))
        finally:
            if made:
                _leave()

    def _sequence_group(self, rank: int, device: torch.device) -> dist.ProcessGroup | None:
        """This worker's group; all workers make all groups together."""
        size, own = self.config.sequence_parallel_size, None
        if size == 1:
            return None
        for first in range(0, self.config.num_workers, size):
            group = dist.new_group(list(range(first, first + size)), backend=backend_for(device))
            if first <= rank < first + size:
                own = group
        return own


def _leave() -> None:
    """End the process group, through DeepSpeed if that has joined: it keeps groups of its own for the next engine."""
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()
    else:
        dist.destroy_process_group()


def backend_for(device: torch.device) -> str:
    """The collective library for gradients on `device`."""
    return "nccl" if device.type == "cuda" else "gloo"


def arithmetic(precision: Precision, zero_stage: int, device: torch.device) -> torch.dtype:
    """The type weights are computed in; master weights and optimizer state are always float32.

    Raises:
        ConfigError: bf16 with zero_stage 0, where DeepSpeed keeps no float32 gradients.
    """
    if precision == "fp32":
        return torch.float32
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "auto" and not native:
        return torch.float32
    if zero_stage == 0:
        raise ConfigError(
            "training.parallel.zero_stage 0 cannot accumulate float32 gradients of bf16 weights; "
            "use training.parallel.zero_stage=1 or training.precision=fp32"
        )
    return torch.bfloat16


def deepspeed_config(
    *,
    zero_stage: int,
    dtype: torch.dtype,
    micro_batch_size: int,
    accumulation: int,
    gradient_clipping: float,
    num_parameters: int,
) -> dict[str, Any]:
    """DeepSpeed's configuration for one run. Stage 0 clips outside DeepSpeed, which would not tell the norm."""
    bucket = min(REDUCE_BUCKET, -(-num_parameters // ALIGNMENT) * ALIGNMENT)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": gradient_clipping if zero_stage else 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": zero_stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket},
    }
    if dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings
