"""A fixed set of tokens that is routed again and again, to see routing settle.

In: the data of a run. Out: the batches of this worker; and the experts of those tokens under every kept checkpoint,
compared with the last: router saturation (OLMoE, arXiv 2409.02060, section 5.1).

Legend: R rows of a worker, N tokens of all rows, T sequence length, L mixture layers, K slots per token.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from blues import config as cfg
from blues.data.mixture.batches import Batch, Mixture
from blues.errors import CheckpointError
from blues.model.moe.layer import mixtures
from blues.model.transformer import Transformer
from blues.tracking.metrics import stack_ids
from blues.tracking.specialization_files import SaturationCurve
from blues.training.checkpoint import checkpoint_folders, read_checkpoint


class Probe:
    """The first samples of a split, spread over the workers one by one.

    `batches`: of one row each, so that its logits fit beside a training step's memory, and whether it is this worker's
    own. Every worker has equally many, as ZeRO-3 fetches weights together; a spare one counts nothing.
    """

    def __init__(self, data: Mixture, num_samples: int, rank: int = 0, world_size: int = 1) -> None:
        """Takes `num_samples` samples, or one epoch if the split is smaller."""
        self.num_samples = min(num_samples, data.num_samples_per_epoch)
        self.rank, self.world_size = rank, world_size
        own = list(range(rank, self.num_samples, world_size))
        self.num_own = len(own)
        rounds = math.ceil(self.num_samples / world_size)
        rows = [*own, *[0] * (rounds - len(own))]
        self.batches: list[tuple[Batch, bool]] = [
            (data.batch([row]), number < self.num_own) for number, row in enumerate(rows)
        ]

    def own_rows(self, ids_NLK: Tensor) -> Tensor | None:
        """`ids_RTLK` of this worker's rows of a record of all; None if that is of another number of tokens."""
        length = self.batches[0][0].inputs.shape[1]
        if len(ids_NLK) != self.num_samples * length:
            return None
        return ids_NLK.unflatten(0, (self.num_samples, length))[self.rank :: self.world_size]

    @torch.no_grad()
    def route(self, model: Transformer) -> Tensor:
        """`ids_NLK` of all rows under a model (of one worker)."""
        width = max(moe.router.num_experts for _, moe in mixtures(model))
        device = next(model.parameters()).device
        model.eval()
        rows = []
        for batch, _ in self.batches:
            batch = batch.to(device)
            _, routing = model.hidden(batch.inputs, documents=batch.documents, languages=batch.languages)
            rows.append(stack_ids(routing, width))
        return torch.cat(rows).cpu()


def saturation_of_checkpoints(
    run_dir: str | Path, *, num_samples: int = 16, data: Mixture | None = None, device: torch.device | str = "cpu"
) -> SaturationCurve:
    """Router saturation of every kept checkpoint of a run against the newest.

    Args:
        num_samples: sequences to route.
        data: what they are taken from; None: the validation split of the run's dataset.

    Raises:
        CheckpointError: less than two checkpoints, or no mixture of experts. DataError: the dataset is not there.
    """
    folders = checkpoint_folders(run_dir)
    if len(folders) < 2:
        raise CheckpointError(
            f"{run_dir} has {len(folders)} checkpoints, and saturation compares at least two; train with a larger "
            "training.keep_checkpoints, or see RUN/specialization for the curve over training.specialization.every"
        )
    ids_by_step: dict[int, Tensor] = {}
    for folder in folders:
        checkpoint = read_checkpoint(folder, verify=False)
        if data is None:
            data = cfg.load(Mixture.Config, checkpoint.tree["data"]).build(split="validation")
        model = cfg.load(Transformer.Config, checkpoint.tree["model"]).build()
        layers = mixtures(model)
        if not layers:
            raise CheckpointError(f"{folder} has no mixture of experts, so there is no routing to compare")
        model.load_state_dict(checkpoint.load_model_state())
        ids_by_step[checkpoint.step] = Probe(data, num_samples).route(model.to(device))
    sizes = [moe.router.num_experts for _, moe in layers]
    return SaturationCurve.of(ids_by_step, [layer for layer, _ in layers], sizes)
