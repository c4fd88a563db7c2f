"""Checkpoints that do not depend on the number of workers or the ZeRO stage.

In: whole tensors by parameter name, the experiment's tree, the step. Out: a folder that is complete or not there:

    RUN/checkpoints/step-00000100/
        model.safetensors       the float32 (master) weights and the buffers, named as in `Transformer.state_dict()`
        optimizer.safetensors   `<parameter>/<kind>`, e.g. `layers.0.ffn.w1/exp_avg`; the master weights are above
        experiment.yaml         the whole configuration tree of the run
        checkpoint.json         step, tokens, size and checksum of each file, versions; written last

It is written under a temporary name, synchronized to disk, and renamed. No pickles: safetensors, YAML and JSON only.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import blues
from blues.errors import CheckpointError

FORMAT, VERSION = "blues-checkpoint", 1
FOLDER = "checkpoints"
MODEL, OPTIMIZER, TREE, RECORD = "model.safetensors", "optimizer.safetensors", "experiment.yaml", "checkpoint.json"
FILES = (MODEL, OPTIMIZER, TREE)
READABLE = 0o644
STEP_NAME = re.compile(r"step-(\d{8,})")
logger = logging.getLogger("blues")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder. tokens: trained on so far. data_fingerprint: of the samples it was trained on.
    tree: the experiment (`config.load` makes it)."""

    path: Path
    step: int
    tokens: int
    data_fingerprint: str
    tree: dict[str, Any]

    def load_model_state(self) -> dict[str, Tensor]:
        """The float32 weights and the buffers by name, as `Transformer.load_state_dict` takes them (CPU)."""
        with self.open_model() as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

    def open_model(self) -> Any:
        """Context manager over the model's tensors; `get_tensor(name)` reads one (CPU)."""
        return safe_open(self.path / MODEL, framework="pt")

    def open_optimizer(self) -> Any:
        """Context manager over the optimizer's tensors; `get_tensor(state_key(name, kind))` reads one (CPU)."""
        return safe_open(self.path / OPTIMIZER, framework="pt")

    def check_data(self, fingerprint: str, samples: int, tree: Mapping[str, Any]) -> None:
        """Compare with the data that training is to go on with.

        Args:
            fingerprint: of its first `samples` samples, as many as this checkpoint was trained on.
            tree: the experiment they belong to.

        Raises:
            CheckpointError: it was trained on other data, or with phases that are now others.
        """
        if self.data_fingerprint == fingerprint:
            return
        if _phases_before(samples, self.tree) != _phases_before(samples, tree):
            raise CheckpointError(
                f"data.phases would change the weights of samples that {self.path} was trained on already; leave the "
                f"phases before sample {samples:,} as they were and start new ones there or later, or give a new "
                "--run-dir, or --fresh to start over"
            )
        raise CheckpointError(
            f"{self.path} was trained on other data than {tree['data']['path']!r} (or another order of it); give the "
            "same dataset, or a new --run-dir, or --fresh to start over"
        )

    def check_shapes(self, model: nn.Module, tree: Mapping[str, Any]) -> None:
        """Compare with the `model` that is to be filled; `tree` is the experiment it was built from.

        Raises:
            CheckpointError: the first tensor that differs, both shapes, and the configuration keys to look at.
        """
        with self.open_model() as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for name in [*wanted, *saved]:
            if saved.get(name) == wanted.get(name):
                continue
            left, right = ("no such tensor" if s is None else list(s) for s in (saved.get(name), wanted.get(name)))
            keys = _differing(self.tree.get("model"), tree.get("model"), "model")
            look = f"; look at {', '.join(keys)}" if keys else ""
            raise CheckpointError(f"{self.path}: tensor {name!r} has {left} but the model wants {right}{look}")


def state_key(name: str, kind: str) -> str:
    """The name of an optimizer tensor: parameter `name`, state `kind`."""
    return f"{name}/{kind}"


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after update number `step` lies."""
    return Path(run_dir) / FOLDER / f"step-{step:08d}"


def write_checkpoint(
    run_dir: Path,
    *,
    step: int,
    tokens: int,
    data_fingerprint: str,
    tree: Mapping[str, Any],
    model_state: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Tensor],
    details: Mapping[str, Any],
) -> Path:
    """Write a checkpoint, whole or not at all, and return its folder. `details` are recorded (world size, stage)."""
    folder = step_folder(run_dir, step)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(dict(model_state), temporary / MODEL, metadata={"format": "pt"})
    save_file(dict(optimizer_state), temporary / OPTIMIZER, metadata={"format": "pt"})
    (temporary / TREE).write_text(yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True), encoding="utf-8")
    files = {}
    for name in FILES:
        os.chmod(temporary / name, READABLE)  # safetensors gives its files to their owner alone
        _synchronize(temporary / name)
        files[name] = {"bytes": (temporary / name).stat().st_size, "xxh3": _checksum(temporary / name)}
    record = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "tokens": tokens,
        "data_fingerprint": data_fingerprint,
        "files": files,
        "versions": {"blues": blues.__version__, "torch": torch.__version__},
        **details,
    }
    (temporary / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
    _synchronize(temporary / RECORD)
    _synchronize(temporary)
    if folder.exists():  # a damaged one that the run went past
        shutil.rmtree(folder)
    os.rename(temporary, folder)
    _synchronize(folder.parent)
    return folder


def write_first_checkpoint(
    run_dir: Path,
    *,
    model_state: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    state_names: Sequence[str],
    data_fingerprint: str,
    tree: Mapping[str, Any],
    details: Mapping[str, Any],
) -> Path:
    """Write the checkpoint of step 0 of a run that begins with given weights, and an optimizer that has seen nothing.

    Args:
        shapes: of the trained parameters by name. state_names: the optimizer's, see `Optimizer.state_names`.
        data_fingerprint: of none of the run's samples (`Mixture.fingerprint_until(0)`).
    """
    return write_checkpoint(
        run_dir,
        step=0,
        tokens=0,
        data_fingerprint=data_fingerprint,
        tree=tree,
        model_state=model_state,
        optimizer_state={
            state_key(name, kind): torch.zeros(shape, dtype=torch.float32)
            for name, shape in shapes.items()
            for kind in state_names
        },
        details=details,
    )


def read_checkpoint(path: str | Path, *, verify: bool = True) -> Checkpoint:
    """Open a checkpoint folder, or the newest good one of a run folder; `verify` compares the checksums.

    Raises:
        CheckpointError: nothing there, unfinished or damaged (names the file).
    """
    path = Path(path)
    if (path / FOLDER).is_dir():
        newest = latest_checkpoint(path)
        if newest is None:
            raise CheckpointError(f"{path} holds no complete checkpoint yet; train it first with `blues train`")
        return _open(newest, verify=False)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}; give a run folder or a step-... folder inside one")
    return _open(path, verify)


def latest_checkpoint(run_dir: str | Path, report: Callable[[str], None] = logger.warning) -> Path | None:
    """The newest checkpoint of a run whose checksums hold; a damaged newer one is told to `report` and passed over."""
    for folder in reversed(checkpoint_folders(run_dir)):
        try:
            _open(folder, verify=True)
        except CheckpointError as error:
            report(f"skipping a damaged checkpoint: {error}")
            continue
        return folder
    return None


def checkpoint_folders(run_dir: str | Path) -> list[Path]:
    """The finished checkpoint folders of a run, oldest first (not verified)."""
    parent = Path(run_dir) / FOLDER
    if not parent.is_dir():
        return []
    found = [(int(match[1]), child) for child in parent.iterdir() if (match := STEP_NAME.fullmatch(child.name))]
    return [child for _, child in sorted(found)]


def prune_checkpoints(run_dir: str | Path, keep: int, written: Path | None = None) -> None:
    """Remove all but the newest `keep` checkpoints, and what an interrupted write left.

    `written`: one that is known to be good and always stays; a later one may be the damaged one that was passed over.
    """
    others = [folder for folder in checkpoint_folders(run_dir) if folder != written]
    keep_others = keep - (written is not None)
    for folder in others[: len(others) - keep_others]:
        shutil.rmtree(folder)
    for leftover in (Path(run_dir) / FOLDER).glob(".step-*.tmp"):
        shutil.rmtree(leftover)


def _open(path: Path, verify: bool) -> Checkpoint:
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a checkpoint: {RECORD} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / RECORD} cannot be read ({error})") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("version") != VERSION:
        raise CheckpointError(f"{path / RECORD} is not a {FORMAT} of version {VERSION}; this Blues cannot read it")
    try:
        files = {name: (record["files"][name]["bytes"], record["files"][name]["xxh3"]) for name in FILES}
        facts = int(record["step"]), int(record["tokens"]), str(record["data_fingerprint"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / RECORD} lacks or cannot use {error}") from None
    for name, (expected, checksum) in files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(f"{file} {found}, expected {expected} bytes")
        if verify and _checksum(file) != checksum:
            raise CheckpointError(f"{file} is damaged: its checksum is not the one that was written")
    try:
        tree = yaml.safe_load((path / TREE).read_text(encoding="utf-8"))
        for name in (MODEL, OPTIMIZER):
            with safe_open(path / name, framework="pt"):
                pass
    except (yaml.YAMLError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    return Checkpoint(path, *facts, tree)


def _phases_before(samples: int, tree: Mapping[str, Any]) -> list[Any]:
    """The changes of the data's weights that samples before this one can have met."""
    return [phase for phase in tree.get("data", {}).get("phases", []) if phase["start"] < samples]


def _differing(saved: Any, wanted: Any, path: str) -> list[str]:
    """Dotted paths of the leaves in which two trees differ."""
    if isinstance(saved, Mapping) and isinstance(wanted, Mapping):
        keys = [*saved, *(key for key in wanted if key not in saved)]
        return [leaf for key in keys for leaf in _differing(saved.get(key), wanted.get(key), f"{path}.{key}")]
    return [] if saved == wanted else [path]


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _synchronize(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
