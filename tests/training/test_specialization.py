"""Specialization in a real run: all figures are there, right, and the same however the work is spread."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blues import config as cfg
from blues.data.merging.merge import merge
from blues.data.mixture.packing import IGNORED
from blues.data.storage.chunks import ChunkWriter
from blues.errors import CheckpointError, ConfigError
from blues.experiment import Experiment
from blues.tracking.specialization_files import figures_steps, probe_steps, read_figures, read_probe, read_saturation
from blues.training.checkpoint import read_checkpoint
from blues.training.observer import Recorder
from blues.training.probe import Probe, saturation_of_checkpoints
from tests.data.datasets import publish
from tests.training.tiny import TOKENIZER, VOCAB, experiment, run_workers

EVERY = {"training.specialization": {"every": 2, "window": 2, "probe_samples": 5}, "data.languages": True}
KINDS = ("input_token", "target_token", "predicted_token", "domain", "language")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two sources; one of two languages, one without."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer, library = TOKENIZER.build(), Path(os.__file__).parent
    for source, modules in (("code", ("argparse", "ast")), ("text", ("csv", "enum"))):
        (folder / source).mkdir()
        writers = {split: ChunkWriter(folder / source, split, 0) for split in ("train", "validation")}
        for number, module in enumerate(modules):
            content = (library / f"{module}.py").read_text(encoding="utf-8")
            metadata = {"language": f"dialect {number}"} if source == "code" else {}
            for split, part in (("validation", content[:3_000]), ("train", content[3_000:15_000])):
                tokens = np.array([*tokenizer.encode(part), tokenizer.eot_id], dtype=np.uint32)
                writers[split].add(tokens, id=module, source=source, text_bytes=len(part), metadata=metadata)
        publish(folder / source, [writer.close() for writer in writers.values()], TOKENIZER)
    merge([folder / "code", folder / "text"], weights=[0.7, 0.3], strategy="weighted", output=folder / "both")
    return folder / "both"


def train(exp: Experiment, run_dir: Path, stop_after: int | None = None) -> Recorder:
    recorder = Recorder(stop_after)
    exp.training.build(
        model=exp.model.build(seed=0),
        train_data=exp.data.build(),
        validation_data=exp.data.build(split="validation"),
        run_dir=run_dir,
        tree=cfg.dump(exp),
        observer=recorder,
    ).run()
    return recorder


def train_worker(data: Path, run_dir: Path, changes: dict[str, Any]) -> None:
    train(experiment(data).override(EVERY | changes), run_dir)


def reports(run_dir: Path) -> list[dict[str, Any]]:
    folder = run_dir / "specialization"
    return [read_figures(folder, step) for step in figures_steps(folder)]


def assert_alike(left: Any, right: Any, tolerance: float, place: str = "") -> None:
    """Two trees of a report: the same but for numbers within `tolerance` and the order of equally specific tokens."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for key in left:
            if key != "specific_EN":
                assert_alike(left[key], right[key], tolerance, f"{place}.{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), place
        for number, (ours, theirs) in enumerate(zip(left, right, strict=True)):
            assert_alike(ours, theirs, tolerance, f"{place}[{number}]")
    elif isinstance(left, float):
        assert left == pytest.approx(right, abs=tolerance), place
    else:
        assert left == right, place


def test_a_run_logs_all_of_them(data, tmp_path):
    recorder = train(experiment(data).override(EVERY), tmp_path)
    events = [event for event in recorder.events if event.kind == "specialization"]
    assert [event.step for event in events] == [2, 4, 6]
    names = [f"{what}/{kind}" for what in ("specialization", "information") for kind in KINDS]
    for name in (*names, "coactivation"):
        assert math.isfinite(events[-1].metrics[f"experts/{name}"]), name
        assert f"experts/layer_01/{name}" in events[-1].metrics
    assert "experts/saturation" not in events[0].metrics  # nothing to compare with
    assert all(0 < event.metrics["experts/saturation"] <= 1 for event in events[1:])
    for event, report in zip(events, reports(tmp_path), strict=True):
        assert Path(event.details["path"]).name == f"step-{event.step:08d}.json"
        assert (report["step"], report["updates"]) == (event.step, 2)
        assert report["training"]["tokens"] == 2 * 8 * 32
        assert report["probe"]["tokens"] == 5 * 32
        assert report["training"]["names"] == {
            "domain": ["code", "text"],
            "language": ["unknown", "dialect 0", "dialect 1"],
        }
    listed = report["training"]["layers"][0]["kinds"]["input_token"]["specific_EN"][0][0]
    assert listed["text"] == TOKENIZER.build().decode([listed["label"]])
    logged = [event for event in recorder.events if event.kind == "train"][-1].metrics
    for name in ("balance", "interval_balance", "load_cv", "load_entropy", "routing_entropy", "experts_per_token"):
        assert math.isfinite(logged[f"experts/{name}"])


def test_figures_are_those_of_the_updates(data, tmp_path):
    """Weights that hardly move, routing without noise: the last update's tokens, routed by the checkpoint."""
    changes = {
        "training.optimizer.lr": 1e-12,
        "model.moe.router": "softmax_top_k",
        "training.specialization": {"window": 1, "probe_samples": 0},
    }
    exp = experiment(data).override(EVERY | changes)
    train(exp, tmp_path)
    [report] = reports(tmp_path)
    assert report["step"] == 6 and "probe" not in report
    mixture, model = exp.data.build(), exp.model.build()
    model.load_state_dict(read_checkpoint(tmp_path).load_model_state())
    batch = mixture.batch(range(5 * 8, 6 * 8))
    ids_TK = model(batch.inputs).routing[0].ids_TK
    layer = report["training"]["layers"][0]
    for number in range(2):
        rows_T = (batch.sources[:, None].expand_as(batch.inputs) == number).flatten()
        shares = [float((ids_TK[rows_T] == expert).any(-1).double().mean()) for expert in range(4)]
        assert layer["kinds"]["domain"]["share_GE"][number] == pytest.approx(shares)
    for number in range(3):
        rows_T = (batch.languages == number).flatten()
        shares = [float((ids_TK[rows_T] == expert).any(-1).double().mean()) for expert in range(4)]
        assert layer["kinds"]["language"]["share_GE"][number] == pytest.approx(shares)
    for listed in layer["kinds"]["target_token"]["specific_EN"][2]:
        rows_T = (batch.targets == listed["label"]).flatten()
        assert listed["tokens"] == int(rows_T.sum())
        assert listed["share"] == pytest.approx(float((ids_TK[rows_T] == 2).any(-1).double().mean()))


def test_recomputation_counts_once(data, tmp_path):
    exp = experiment(data).override(EVERY)
    train(exp, tmp_path / "plain")
    train(exp.override({"model.gradient_checkpointing": True}), tmp_path / "recomputed")
    assert_alike(reports(tmp_path / "plain"), reports(tmp_path / "recomputed"), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_two_workers_count_what_one_does(data, tmp_path, zero_stage):
    """Five rows of a probe over two workers: one of them has a spare row."""
    quiet = {
        "model.moe.router": "softmax_top_k",
        "data.packing": "best_fit",
        "training.parallel.zero_stage": zero_stage,
    }
    run_workers(1, train_worker, data, tmp_path / "one", quiet)
    run_workers(2, train_worker, data, tmp_path / "two", quiet | {"training.parallel.num_workers": 2})
    ours, theirs = reports(tmp_path / "one"), reports(tmp_path / "two")
    assert_alike(ours, theirs, 0.01)  # sums of gradients in another order move a token or two
    for left, right in zip(ours, theirs, strict=True):
        assert left["training"]["tokens"] == right["training"]["tokens"]
        assert left["training"]["tokens_G"] == right["training"]["tokens_G"]
    folders = [tmp_path / name / "specialization" for name in ("one", "two")]
    ids = [read_probe(folder, 2).ids_NLK for folder in folders]
    assert ids[0].shape == ids[1].shape and float((ids[0] == ids[1]).double().mean()) > 0.99


def test_resumed_reports_equal_unbroken_ones(data, tmp_path):
    """Stopped between two reports' windows; the probe before is found again, and what was reported later forgotten."""
    exp = experiment(data, checkpoint_every=4, steps=8).override(EVERY | {"training.specialization.every": 4})
    whole = train(exp, tmp_path / "whole")
    train(exp, tmp_path / "broken", stop_after=4)
    folder = tmp_path / "broken" / "specialization"
    (folder / "step-00000006.npz").write_bytes(b"of an earlier try")
    (folder / "step-00000006.json").write_text("{}")
    resumed = train(exp, tmp_path / "broken")
    assert probe_steps(folder) == figures_steps(folder) == [4, 8]
    assert_alike(reports(tmp_path / "whole"), reports(tmp_path / "broken"), 0.0)
    assert whole.metrics("experts/saturation") == resumed.metrics("experts/saturation")


def test_saturation_of_checkpoints_is_that_of_the_probes(data, tmp_path):
    """Of each kept checkpoint, loaded and routed anew, against what the run recorded on its way."""
    exp = experiment(data, checkpoint_every=2, keep_checkpoints=3).override(EVERY)
    train(exp, tmp_path)
    recorded = read_saturation(tmp_path / "specialization")
    assert recorded == saturation_of_checkpoints(tmp_path, num_samples=5)
    assert recorded.steps == [2, 4, 6] and recorded.layers == (1,)
    assert recorded.share_SL[-1] == [1.0] and recorded.share_SL[0][0] < 1
    probe = Probe(exp.data.build(split="validation"), 5)
    assert not any((batch.targets == IGNORED).any() for batch, _ in probe.batches)
    with pytest.raises(CheckpointError, match="has 0 checkpoints"):
        saturation_of_checkpoints(tmp_path / "none")


def test_by_default_once_at_the_end_and_never_without_experts(data, tmp_path):
    assert [e.step for e in train(experiment(data), tmp_path / "a").events if e.kind == "specialization"] == [6]
    off = {"training.specialization": {"window": 0, "probe_samples": 0}}
    for number, changes in enumerate((off, {"model.moe": None})):
        recorder = train(experiment(data, steps=2).override(changes), tmp_path / str(number))
        assert not [event for event in recorder.events if event.kind == "specialization"]
        assert not (tmp_path / str(number) / "specialization").exists()


def test_too_large_windows_and_negative_numbers_are_refused(data, tmp_path):
    with pytest.raises(ConfigError, match=r"specialization.window=.* at most 8388607 updates"):
        train(experiment(data, steps=10**9).override({"training.specialization.window": 10**9}), tmp_path)
    with pytest.raises(ConfigError, match="probe_samples must be >= 0"):
        experiment(data).override({"training.specialization.probe_samples": -1})


def test_layers_of_different_sizes_and_variable_numbers_of_experts(data, tmp_path):
    exp = experiment(data, steps=2).override(
        {"model.num_layers": 4, "model.experts_per_layer": [4, 3], "model.moe.router": "relu", "model.moe.top_k": 2}
    )
    recorder = train(exp, tmp_path)
    [report] = reports(tmp_path)
    layers = report["training"]["layers"]
    assert [len(layer["load_E"]) for layer in layers] == [4, 3]
    metrics = next(event.metrics for event in recorder.events if event.kind == "train")
    assert metrics["experts/experts_per_token"] != pytest.approx(2)
    assert "experts/layer_03/load_02" in metrics and "experts/layer_03/load_03" not in metrics


def test_the_report_is_plain_json(data, tmp_path):
    train(experiment(data, steps=2).override(EVERY), tmp_path)
    text = (tmp_path / "specialization" / "step-00000002.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert VOCAB < 1_000 and len(text) < 200_000
    ids_NLK = read_probe(tmp_path / "specialization", 2).ids_NLK
    assert ids_NLK.shape == (5 * 32, 1, 2) and ids_NLK.dtype == torch.int64
