"""Every router in training: resumed equals unbroken, state adapts alike for any number of workers, and it generates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blues import config as cfg
from blues.experiment import Experiment
from blues.inference.engine import generate
from blues.inference.loading import load_model
from blues.model.moe.layer import mixtures
from blues.model.moe.routing import Router
from blues.training.adaptation import RouterAdaptation
from blues.training.checkpoint import read_checkpoint
from blues.training.observer import Recorder
from tests.model.examples import lively, small
from tests.training.test_trainer import assert_identical
from tests.training.tiny import experiment, make_dataset, run_workers

pytestmark = pytest.mark.filterwarnings("ignore:moe.router=expert_choice")
SPREAD = ("sigmoid_bias", "relu", "threshold", "expert_choice")
SCOPES = {"sequence": 1, "global_batch": 8, "micro_batch": 8}
"""With the samples of a forward on one worker; the last one is known to depend on them."""
ADAPTING = ("sigmoid_bias", "group_limited", "relu", "threshold", "expert_choice")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


def train(exp: Experiment, run_dir: Path, stop_after: int | None = None) -> Recorder:
    recorder = Recorder(stop_after)
    exp.training.build(
        model=exp.model.build(seed=exp.training.seed),
        train_data=exp.data.build(split="train"),
        validation_data=None,
        run_dir=run_dir,
        tree=cfg.dump(exp),
        observer=recorder,
    ).run()
    return recorder


def buffers_of(run_dir: Path) -> dict[str, torch.Tensor]:
    state = read_checkpoint(run_dir).load_model_state()
    return {name: tensor for name, tensor in state.items() if name.endswith(("_E", "strength", "updates"))}


@pytest.mark.parametrize("variant", sorted(Router.variants))
def test_a_router_trains_resumes_bit_for_bit_and_generates(data, tmp_path, variant):
    changes = {"model.moe.router": variant, "data.isolate_documents": variant == "document_pools"}
    exp = experiment(data, steps=5, checkpoint_every=0, validate_every=0, log_every=1).override(changes)
    losses = train(exp, tmp_path / "whole").metrics("train/loss")
    assert losses[5] < losses[1]
    train(exp, tmp_path / "broken", stop_after=3)
    resumed = train(exp, tmp_path / "broken").metrics("train/loss")
    assert_identical(tmp_path / "whole", tmp_path / "broken")
    assert resumed == {step: losses[step] for step in (4, 5)}
    state = buffers_of(tmp_path / "whole")
    assert bool(state) == (variant in ADAPTING)
    fresh = exp.model.build().state_dict()
    assert all(not torch.equal(tensor, fresh[name]) for name, tensor in state.items()), "the state was adapted"
    loaded = load_model(tmp_path / "whole")
    for name, tensor in state.items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    for generation in generate(loaded, ["def ", "import os, sys"], max_length=6, temperature=0.0):
        assert len(generation.new_ids) == 6 or generation.stop == "eot"


@pytest.mark.slow
def test_in_bfloat16_state_stays_float32(data, tmp_path):
    changes = {"model.moe.router": "sigmoid_bias", "training.precision": "bf16"}
    exp = experiment(data, steps=3, micro_batch_size=8, checkpoint_every=0, validate_every=0).override(changes)
    train(exp, tmp_path / "whole")
    train(exp, tmp_path / "broken", stop_after=2)
    train(exp, tmp_path / "broken")
    assert_identical(tmp_path / "whole", tmp_path / "broken")
    (bias,) = buffers_of(tmp_path / "whole").values()
    assert bias.dtype == torch.float32 and not torch.equal(bias, bias.bfloat16().float()), "bfloat16 would lose steps"


@pytest.mark.parametrize("variant", ["sigmoid_bias", "relu"])
def test_recomputation_counts_once(data, tmp_path, variant):
    exp = experiment(data, steps=2, checkpoint_every=0, validate_every=0).override({"model.moe.router": variant})
    train(exp, tmp_path / "plain")
    train(exp.override({"model.gradient_checkpointing": True}), tmp_path / "recomputed")
    assert_identical(tmp_path / "plain", tmp_path / "recomputed")


def test_routers_hear_how_far_the_training_is(data, tmp_path):
    exp = experiment(data, steps=4, micro_batch_size=8, checkpoint_every=0, validate_every=0)
    model, heard = exp.model.build(), []
    mixtures(model)[0][1].router.register_forward_pre_hook(
        lambda router, inputs: heard.append((router.training, inputs[1].progress))
    )
    exp.training.build(
        model=model,
        train_data=exp.data.build(split="train"),
        validation_data=exp.data.build(split="validation"),
        run_dir=tmp_path,
        tree=cfg.dump(exp),
    ).run()
    assert [progress for training, progress in heard if training][-4:] == [0.0, 0.25, 0.5, 0.75]
    assert {progress for training, progress in heard if not training} == {1.0}


def on_two_workers(data: Path, root: Path) -> None:
    for variant in SPREAD:
        train(setting(data, variant, micro_batch_size=2, workers=2), root / variant)
    for scope in SCOPES:
        train(balanced(data, scope, micro_batch_size=4, workers=2), root / scope)


def setting(data: Path, variant: str, *, micro_batch_size: int, workers: int) -> Experiment:
    parallel = {"parallel.num_workers": workers, "parallel.zero_stage": workers}
    sizes = {"steps": 2, "validate_every": 0, "checkpoint_every": 0, "micro_batch_size": micro_batch_size}
    return experiment(data, **sizes, **parallel).override({"model.moe.router": variant})


def balanced(data: Path, scope: str, *, micro_batch_size: int, workers: int) -> Experiment:
    """A balancing loss so heavy that a wrong one shows."""
    exp = setting(data, "softmax_top_k", micro_batch_size=micro_batch_size, workers=workers)
    return exp.override({"model.moe.load_balancing_scope": scope, "model.moe.load_balancing_weight": 5.0})


def test_two_workers_adapt_and_balance_as_one_does(data, tmp_path):
    """Four micro batches of two samples make an update, on one worker or spread over two. Balancing over the global
    batch knows all loads from the start, so eight samples in one forward are compared with four on each worker."""
    run_workers(2, on_two_workers, data, tmp_path / "two")
    for variant in SPREAD:
        train(setting(data, variant, micro_batch_size=2, workers=1), tmp_path / variant)
        one, two = buffers_of(tmp_path / variant), buffers_of(tmp_path / "two" / variant)
        assert one and one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-5)
    for scope, micro_batch_size in SCOPES.items():
        train(balanced(data, scope, micro_batch_size=micro_batch_size, workers=1), tmp_path / scope)
        one, two = (read_checkpoint(root / scope).load_model_state() for root in (tmp_path, tmp_path / "two"))
        equal = [torch.allclose(two[name], one[name], atol=1e-5, rtol=1e-5) for name in one]
        assert all(equal) == (scope != "micro_batch"), scope


def test_routers_without_state_reduce_nothing():
    """Outside a process group a reduction would fail."""
    model = lively(small().build())
    adaptation = RouterAdaptation(model)
    adaptation.add(model(torch.tensor([[1, 2, 3]])).routing)
    adaptation.finish()


def test_each_layer_is_handed_its_own_sum(monkeypatch):
    model = lively(small(moe__router="sigmoid_bias", experts_per_layer=[4, 3]).build())
    adaptation, handed, reduced = RouterAdaptation(model), [], []
    # Another worker like this one.
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: reduced.append(sums.mul_(2)))
    for _, moe in mixtures(model):
        moe.router.adapt = handed.append
    routings = [model(torch.tensor([ids])).routing for ids in ([1, 2, 3], [4, 5, 6, 7])]
    for routing in routings:
        adaptation.add(routing)
    adaptation.finish()
    assert len(reduced) == 1, "one reduction for all layers"
    for layer, size in enumerate((4, 3)):
        ids = torch.cat([routing[layer].ids_TK for routing in routings])
        assert handed[layer].tolist() == (2 * torch.bincount(ids.flatten(), minlength=size)).tolist()
