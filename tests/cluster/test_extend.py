"""A run taken to a longer context: an ordinary run, figures before and after, resumable; nonsense is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from blues import config as cfg
from blues.cluster import extend as module
from blues.cluster import session
from blues.cluster.extend import Extension, extend, extended_experiment, reshaped, short_documents, table
from blues.cluster.train import TrainingResult, _Run
from blues.errors import CheckpointError, ConfigError
from blues.evaluation.retrieval import Retrieval, Tracking
from blues.experiment import Experiment
from blues.inference.loading import load_model
from blues.training.checkpoint import latest_checkpoint, read_checkpoint
from blues.training.extend import NONE, extended_model
from tests.inference.models import tiny
from tests.training.test_trainer import assert_identical, train
from tests.training.tiny import experiment, make_dataset

OBJECT_STORE = 200 * 2**20
SMALL = {
    "samples": 4,
    "retrieval": Retrieval.Config(keys=2, depths=2, name_words=1),
    "tracking": Tracking.Config(chains=2, depths=2),
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run at 32 tokens."""
    folder = tmp_path_factory.mktemp("runs")
    exp = experiment(make_dataset(folder / "data"), steps=2).override({"model.max_seq_len": 32})
    train(exp, folder / "short")
    return folder / "short"


def planned(run_dir: Path, **changes):
    values = {"length": 128, "method": "yarn", "steps": 30, **changes}
    return extended_experiment(read_checkpoint(run_dir), Extension(**values))


def test_the_new_run_keeps_its_tokens_per_update_and_starts_at_a_tenth_of_the_rate(run_dir):
    old = cfg.load(Experiment, read_checkpoint(run_dir).tree)
    new, original = planned(run_dir)
    assert original == 32 and new.name == "tiny-test-128-yarn"
    assert new.data.sequence_length == new.model.max_seq_len == 128
    assert new.model.attention.rope.factor == 4.0
    assert new.training.global_batch_size * 128 == old.training.global_batch_size * 32
    assert new.training.micro_batch_size == 1 and new.training.steps == 30
    assert new.training.optimizer.lr == pytest.approx(old.training.optimizer.lr / 10)
    assert new.training.schedule.warmup_steps == 2
    assert planned(run_dir, lr=1e-5)[0].training.optimizer.lr == 1e-5
    assert planned(run_dir, length=8192)[0].training.global_batch_size == 1
    source, extension = read_checkpoint(run_dir), Extension(length=128, method="yarn", steps=3)
    changed, _ = extended_experiment(source, extension, None, ["model.attention.rope.beta_fast=16"])
    assert changed.model.attention.rope.beta_fast == 16


def test_what_makes_no_sense_is_refused(run_dir, tmp_path):
    for changes, words in (
        ({"length": 32}, "is no extension"),
        ({"length": 0}, "--length must be at least 1"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"lr": 0.0}, "--lr must be positive"),
        ({"method": "yarm"}, "Did you mean 'yarn'"),
    ):
        with pytest.raises(ConfigError, match=words):
            planned(run_dir, **changes)
    extension, source = Extension(length=64, method="ntk", steps=2), read_checkpoint(run_dir)
    with pytest.raises(ConfigError, match="unknown key 'model.attention.rope.beta_fast'"):
        extended_experiment(source, extension, None, ["model.attention.rope.beta_fast=3"])
    with pytest.raises(ConfigError, match="factor"):
        extended_experiment(source, extension, None, ["model.attention.rope.factor=0.5"])
    with pytest.raises(ConfigError, match="is the run that is to be extended"):
        extend(run_dir, run_dir, extension, say=lambda line: None)
    with pytest.raises(CheckpointError, match=r"model.dim"):
        extend(run_dir, tmp_path / "wide", Extension(length=64, method="ntk", steps=2, **SMALL),
               overrides=["model.dim=64"], device="cpu", say=lambda line: None)  # fmt: skip


def test_short_documents_are_told_of(run_dir):
    path = read_checkpoint(run_dir).tree["data"]["path"]
    assert short_documents(path, 16) is None
    warning = short_documents(path, 1 << 20)
    assert warning is not None and warning.startswith("100% of the training documents, with 100% of the tokens")


def test_the_same_weights_read_alike_within_the_old_length():
    loaded = tiny()
    longer = extended_model(loaded.config, original=48, length=96, method=NONE)
    tokens = torch.arange(40)[None]
    wide = reshaped(loaded, longer)
    assert torch.equal(wide.model(tokens).logits_BTV, loaded.model(tokens).logits_BTV)
    assert wide.max_seq_len == 96, "and the weights are shared"
    assert wide.model.embedding.weight.data_ptr() == loaded.model.embedding.weight.data_ptr()


@pytest.fixture(params=["here", pytest.param("ray", marks=(pytest.mark.ray, pytest.mark.slow))])
def interruptible(request, monkeypatch):
    """`interruptible(run)` calls `run` and stops its training at the first step, under Ray or in this process."""
    if request.param == "ray":
        with session.connect("local", num_cpus=2, object_store_memory=OBJECT_STORE):
            yield lambda run: _stopped_after_one_step(monkeypatch, run)
        return
    stops: list[int] = []

    def run_here(experiment: Experiment, folder: Path, address: str | None = None) -> TrainingResult:
        outcome, _ = train(experiment, folder, stop_after=stops.pop() if stops else None)
        newest, steps = latest_checkpoint(folder), experiment.training.steps
        stopped = not outcome.finished
        return TrainingResult(
            run_dir=folder, step=outcome.step, steps=steps, interrupted=stopped, checkpoint=newest, metrics={}
        )

    monkeypatch.setattr(module, "run_training", run_here)

    def stopped(run):
        stops.append(1)
        return run()

    yield stopped


def test_an_extended_run_stops_resumes_and_is_an_ordinary_run(run_dir, tmp_path, interruptible):
    out = tmp_path / "long"
    extension = Extension(length=128, method="yarn", steps=3, **SMALL)

    def run():
        overrides = ["training.checkpoint_every=1", "training.keep_checkpoints=9"]
        return extend(run_dir, out, extension, overrides=overrides, device="cpu", say=lambda line: None)

    stopped = interruptible(run)
    assert stopped.training.interrupted and stopped.figure is None
    assert list(stopped.measured["results"]) == ["original", "untrained"] and "before" in table(stopped.measured)
    resumed = run()
    assert resumed.training.finished and resumed.figure is not None and resumed.figure.is_file()
    tree = json.loads((out / "extension.json").read_text())
    assert list(tree["results"]) == ["original", "untrained", "after"] and tree["original_length"] == 32
    assert tree["results"]["original"] == stopped.measured["results"]["original"], "measured once"
    assert tree["results"]["original"]["positions"] != tree["results"]["untrained"]["positions"]
    printed = resumed.table()
    assert "yarn, untrained" in printed and "120-128 *" in printed and "retrieval in 128" in printed
    metrics = (out / "metrics.jsonl").read_text()
    assert "extension/after/retrieval/128/accuracy" in metrics
    assert run().measured == tree, "the same command again does nothing"

    loaded = load_model(out, device="cpu")
    assert loaded.max_seq_len == 128 and loaded.config.attention.rope.factor == 4.0 and loaded.step == 3
    shutil.copytree(out / "checkpoints" / "step-00000000", tmp_path / "here" / "checkpoints" / "step-00000000")
    train(cfg.load(Experiment, loaded.tree), tmp_path / "here")
    assert_identical(out, tmp_path / "here")
    with pytest.raises(ConfigError, match=r"long extends .*short/checkpoints/step-00000002, not .*step-00000003"):
        module._check_source(out, read_checkpoint(tmp_path / "here"))


def _stopped_after_one_step(monkeypatch, run):
    """As Ctrl-C does: the first event of training asks to stop."""
    handle = _Run._handle

    def stop(self, event):
        self.stop_requests += event.kind == "train"
        handle(self, event)

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_handle", stop)
        return run()
