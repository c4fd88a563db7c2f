"""The files of RUN/specialization: figures as JSON, and the experts of a fixed probe at each report.

In: a run folder's `specialization` folder. Out: the figures of a step, and the curve of router saturation over all of
a run, which needs no checkpoint but the record of where the probe's tokens went.

Shapes: N tokens of the probe, L mixture-of-experts layers, K slots per token.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blues.config import write_atomic
from blues.errors import TrackingError
from blues.tracking.specialization import saturation_curve

FOLDER = "specialization"
_NAME = re.compile(r"step-(\d{8,})\.(npz|json)")


@dataclass(frozen=True)
class ProbeRecord:
    """Where the probe's tokens went after an update. layers: index of each mixture within the transformer.
    num_experts: E of each."""

    ids_NLK: Tensor
    layers: tuple[int, ...]
    num_experts: tuple[int, ...]


@dataclass(frozen=True)
class SaturationCurve:
    """Router saturation against the last probe: `share_SL[step][layer]`, 1 at the end; `even_L` is what experts drawn
    evenly would have (k / E)."""

    steps: list[int]
    layers: tuple[int, ...]
    share_SL: list[list[float]]
    even_L: list[float]

    @classmethod
    def of(
        cls, ids_by_step: Mapping[int, Tensor], layers: Sequence[int], num_experts: Sequence[int]
    ) -> SaturationCurve:
        """Of the same tokens' `ids_NLK` at each step."""
        steps, share_SL = saturation_curve(ids_by_step, max(num_experts))
        last_NLK = ids_by_step[steps[-1]]
        chosen = [(last_NLK[:, number] < experts).sum() for number, experts in enumerate(num_experts)]
        even_L = [float(c) / len(last_NLK) / experts for c, experts in zip(chosen, num_experts, strict=True)]
        return cls(steps, tuple(layers), share_SL, even_L)


def write_probe(folder: Path, step: int, ids_NLK: Tensor, layers: Sequence[int], num_experts: Sequence[int]) -> Path:
    """Keep the experts of the probe after update `step`; ids of `max(num_experts)` are no expert."""
    smallest = np.min_scalar_type(max(num_experts))
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        ids=ids_NLK.numpy().astype(smallest),
        layers=np.array(layers, dtype=np.int32),
        num_experts=np.array(num_experts, dtype=np.int32),
    )
    path = folder / f"step-{step:08d}.npz"
    write_atomic(path, buffer.getvalue())
    return path


def read_probe(folder: Path, step: int) -> ProbeRecord:
    """What `write_probe` kept.

    Raises:
        TrackingError: the file is not there or damaged.
    """
    path = folder / f"step-{step:08d}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            ids, layers, num_experts = (file[name] for name in ("ids", "layers", "num_experts"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise TrackingError(f"{str(path)!r} cannot be read ({error}); remove it, it is only a figure") from None
    return ProbeRecord(torch.from_numpy(ids.astype(np.int64)), tuple(layers.tolist()), tuple(num_experts.tolist()))


def probe_steps(folder: Path) -> list[int]:
    """The updates after which a probe was kept, in order."""
    return [step for step, path in _files(folder) if path.suffix == ".npz"]


def figures_steps(folder: Path) -> list[int]:
    """The updates of which there are figures, in order."""
    return [step for step, path in _files(folder) if path.suffix == ".json"]


def read_figures(folder: Path, step: int) -> dict[str, Any]:
    """The JSON of a report: step, updates, saturation, and `Specialization.tree` of `training` and of `probe`.

    Raises:
        TrackingError: the file is not there or damaged.
    """
    path = folder / f"step-{step:08d}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrackingError(f"{str(path)!r} cannot be read ({error}); remove it, it is only a figure") from None


def read_saturation(folder: Path) -> SaturationCurve | None:
    """The curve over all probes of a run; None for less than two of the same tokens and layers as the last one."""
    records = {step: read_probe(folder, step) for step in probe_steps(folder)}
    if not records:
        return None
    last = records[max(records)]
    alike = {
        step: record.ids_NLK
        for step, record in records.items()
        if record.layers == last.layers and len(record.ids_NLK) == len(last.ids_NLK)
    }
    if len(alike) < 2:
        return None
    return SaturationCurve.of(alike, last.layers, last.num_experts)


def forget_after(folder: Path, step: int) -> None:
    """Delete the files of later updates, which a resumed run trains again."""
    for later, path in _files(folder):
        if later > step:
            path.unlink()


def _files(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found)
