"""How the workers of one machine find each other: through a file, with every socket on 127.0.0.1.

In: Ray Train's worker group. Out: a torch process group. Ray's own way is a TCP store on worker 0, and torch's store
listens on every interface of the machine; a training run on a laptop should open no port to its network. Runs that
spread over several machines keep Ray's way.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


@dataclass
class FileRendezvous(TorchConfig):
    """`folder`: where the file lies, on a disk that all workers see. `backend` must be given."""

    folder: str = ""

    @property
    def backend_cls(self) -> type[_FileBackend]:
        return _FileBackend


class _FileBackend(_TorchBackend):
    """Replaces the meeting of the workers alone; leaving and the sharing of GPUs are Ray's."""

    def on_start(self, worker_group: Any, backend_config: FileRendezvous) -> None:  # type: ignore[override]
        # A new file for every start of the workers: a store that lost a worker must not be met again.
        file = Path(backend_config.folder, f"rendezvous-{uuid.uuid4().hex}")
        worker_group.execute(os.environ.update, LOOPBACK if Path("/sys/class/net/lo").exists() else {})
        worker_group.execute(_set_torch_distributed_env_vars)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank,
                    meet,
                    file=str(file),
                    backend=backend_config.backend,
                    world_rank=rank,
                    world_size=len(worker_group),
                    timeout=timedelta(seconds=backend_config.timeout_s),
                )
                for rank in range(len(worker_group))
            ]
        )


def meet(file: str, backend: str, world_rank: int, world_size: int, timeout: timedelta) -> None:
    """Join the process group of the workers that were given the same `file`."""
    store = dist.FileStore(file, world_size)  # not a file:// address, in which torch cannot read a blank
    dist.init_process_group(backend, store=store, rank=world_rank, world_size=world_size, timeout=timeout)
