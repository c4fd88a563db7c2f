"""Every registered pattern trains on real tokens, resumes bit for bit, and generates from its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blues import config as cfg
from blues.data.mixture.batches import Mixture
from blues.experiment import Experiment
from blues.inference.cache import Cache
from blues.inference.engine import load_model, sample_text
from blues.model.attention.patterns import AttentionPattern
from blues.model.transformer import Transformer
from blues.training.checkpoint import read_checkpoint
from blues.training.observer import Recorder
from tests.model.attention.patterns import PATTERNS, random_tree
from tests.training.tiny import experiment, make_dataset

STEPS = 5
TRAINED = sorted(name for name in PATTERNS if not PATTERNS[name][-1].build().needs_tree)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


def experiment_of(data: Path, pattern: AttentionPattern.Config) -> Experiment:
    base = experiment(data, steps=STEPS, checkpoint_every=3, validate_every=0, validation_samples=0)
    changes = {"model.attention.pattern": cfg.dump(pattern), "model.attention.num_heads": 4, "model.num_layers": 2}
    return base.override(changes)


def train(exp: Experiment, run_dir: Path, stop_after: int | None = None) -> Recorder:
    recorder = Recorder(stop_after)
    train_data: Mixture = exp.data.build(split="train")
    model = exp.model.build(seed=exp.training.seed)
    tree = cfg.dump(exp)
    exp.training.build(
        model=model, train_data=train_data, validation_data=None, run_dir=run_dir, tree=tree, observer=recorder
    ).run()
    return recorder


@pytest.mark.parametrize("name", TRAINED)
def test_it_trains_resumes_and_generates(name, data, tmp_path):
    exp = experiment_of(data, PATTERNS[name][-1])
    whole = train(exp, tmp_path / "whole")
    train(exp, tmp_path / "cut", stop_after=3)
    train(exp, tmp_path / "cut")
    states = [read_checkpoint(tmp_path / run).load_model_state() for run in ("whole", "cut")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    losses = [event.metrics["train/loss"] for event in whole.events if event.kind == "train"]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    assert any("train/attention_span" in event.metrics for event in whole.events) == (name == "adaptive_window")
    model = load_model(tmp_path / "cut")
    text = sample_text(model, "def main(", max_length=12, temperature=0.0)
    assert text and text == sample_text(load_model(tmp_path / "whole"), "def main(", max_length=12, temperature=0.0)


def test_a_pattern_of_trees_trains_resumes_and_generates(data):
    """Stores hold no trees yet, so the loop is written out."""
    exp = experiment_of(data, PATTERNS["prefix_syntax"][0])
    batch = exp.data.build(split="train").batch(range(8))
    tree = random_tree(8, batch.inputs.shape[1])

    def steps(model: Transformer, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            torch.manual_seed(step)
            loss = model(batch.inputs, batch.targets, tree=tree).losses.total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def fresh() -> tuple[Transformer, torch.optim.Optimizer]:
        model: Transformer = exp.model.build(seed=0)
        return model, torch.optim.AdamW(model.parameters(), lr=3e-3)

    (whole, whole_optimizer), (cut, cut_optimizer), (resumed, resumed_optimizer) = fresh(), fresh(), fresh()
    losses = steps(whole, whole_optimizer, 0, STEPS)
    assert losses[-1] < losses[0]
    steps(cut, cut_optimizer, 0, 3)
    resumed.load_state_dict(cut.state_dict())
    resumed_optimizer.load_state_dict(cut_optimizer.state_dict())
    assert steps(resumed, resumed_optimizer, 3, STEPS) == losses[3:]
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in resumed.state_dict().items())
    generated = []
    for model in (whole, resumed):
        model.eval()
        ids = batch.inputs[:1, :6]
        cache = Cache(num_layers=2, rows=1, num_kv_heads=1, head_dim=16, capacity=20)
        with torch.no_grad():
            for end in range(6, 20):
                logits = model(ids[:, cache.length :], cache=cache, tree=random_tree(1, end, whole=20)).logits_BTV
                cache.advance([end - cache.length])
                ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
        generated.append(ids.tolist())
    assert generated[0] == generated[1]
