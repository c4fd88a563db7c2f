"""The training loop: equal to a plain torch loop, resumable bit for bit, the same for any workers and ZeRO stage."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from blues import config as cfg
from blues.data.merging.merge import merge
from blues.data.mixture.batches import rank_indices
from blues.data.mixture.packing import IGNORED
from blues.errors import CheckpointError, TrainingError
from blues.experiment import Experiment
from blues.model.losses import combine_losses
from blues.training.checkpoint import checkpoint_folders, read_checkpoint
from blues.training.observer import Recorder
from blues.training.optim import parameter_groups
from blues.training.trainer import Outcome, Trainer, noise_seed
from tests.data.datasets import make_store
from tests.training.tiny import TOKENIZER, experiment, make_dataset, run_workers

STAGES = (0, 1, 2, 3)
LOSS_WEIGHTS = ("load_balancing_weight", "router_z_weight")
PACKED = {"data.packing": "best_fit", "data.isolate_documents": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def snippets(tmp_path_factory) -> Path:
    """Two sources of documents of some lines, most of them shorter than a sequence of 32 tokens."""
    folder = tmp_path_factory.mktemp("snippets")
    text = (Path(os.__file__).parent / "argparse.py").read_text(encoding="utf-8")
    paragraphs = [paragraph[:120] for paragraph in text.split("\n\n") if paragraph.strip()]
    for name, own in (("short", [p[:40] for p in paragraphs[:150]]), ("long", paragraphs[150:300])):
        make_store(folder / name, train=[own], validation=[own[:20]], tokenizer=TOKENIZER)
    merge([folder / "short", folder / "long"], folder / "both", weights=[0.6, 0.4])
    return folder / "both"


def trainer(exp: Experiment, run_dir: Path, recorder: Recorder, model=None) -> Trainer:
    return exp.training.build(
        model=exp.model.build(seed=exp.training.seed) if model is None else model,
        train_data=exp.data.build(split="train"),
        validation_data=exp.data.build(split="validation"),
        run_dir=run_dir,
        tree=cfg.dump(exp),
        observer=recorder,
    )


def train(exp: Experiment, run_dir: Path, stop_after: int | None = None) -> tuple[Outcome, Recorder]:
    recorder = Recorder(stop_after)
    return trainer(exp, run_dir, recorder).run(), recorder


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint (or of the newest of a run)."""
    checkpoint = read_checkpoint(path)
    with checkpoint.open_optimizer() as file:
        states = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return checkpoint.load_model_state() | states


def assert_identical(first: Path, second: Path) -> None:
    left, right = tensors(first), tensors(second)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different


def reference(exp: Experiment) -> tuple[list[float], dict[str, torch.Tensor]]:
    """A plain torch loop over whole global batches, cut into the same micro batches: losses and final weights.

    The cross-entropy of a global batch is summed over its micro batches and divided once, by all its targets.
    """
    training = exp.training
    model, mixture = exp.model.build(seed=training.seed), exp.data.build(split="train")
    optimizer = torch.optim.AdamW(
        parameter_groups(model, training.optimizer.weight_decay),
        lr=training.optimizer.lr,
        betas=tuple(training.optimizer.betas),
        eps=training.optimizer.eps,
    )
    schedule = training.schedule.build(total_steps=training.steps)
    micro_batches = training.global_batch_size // training.micro_batch_size
    losses = []
    for step in range(training.steps):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = (
            schedule.factor(step) * training.optimizer.lr
        )
        total, size, moe = 0.0, training.micro_batch_size, exp.model.moe
        batches = [
            mixture.batch(rank_indices(step, micro, 0, 1, size, training.global_batch_size))
            for micro in range(micro_batches)
        ]
        targets = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
        for batch in batches:
            output = model(batch.inputs, documents=batch.documents)
            logits_NV, targets_N = output.logits_BTV.flatten(0, 1), batch.targets.flatten()
            summed = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="sum")
            weights = {name: getattr(moe, name) / micro_batches for name in LOSS_WEIGHTS}
            loss = combine_losses(summed / targets, output.routing, **weights).total
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, model.state_dict()


NOISELESS = {"model.moe.router": "softmax_top_k", "training.gradient_clipping": 0.3}
"""Router noise depends on the worker by design; clipping is set to bite at every step."""


def test_one_process_equals_a_plain_torch_loop(data, tmp_path):
    exp = experiment(data).override(NOISELESS)
    losses, weights = reference(exp)
    _, recorder = train(exp, tmp_path)
    assert list(recorder.metrics("train/loss").values()) == pytest.approx(losses, abs=1e-6)
    assert min(recorder.metrics("train/gradient_norm").values()) > 0.3
    trained = read_checkpoint(tmp_path).load_model_state()
    for name, weight in weights.items():
        torch.testing.assert_close(trained[name], weight, atol=1e-5, rtol=1e-5)


def test_packed_and_isolated_documents_equal_a_plain_torch_loop(snippets, tmp_path):
    exp = experiment(snippets).override(NOISELESS | PACKED)
    mixture = exp.data.build()
    counts = [mixture.num_targets(range(start, start + 2)) for start in range(0, 48, 2)]
    assert len(set(counts)) > 5, "micro batches have many or few targets"
    losses, weights = reference(exp)
    _, recorder = train(exp, tmp_path)
    assert list(recorder.metrics("train/loss").values()) == pytest.approx(losses, abs=1e-6)
    trained = read_checkpoint(tmp_path).load_model_state()
    for name, weight in weights.items():
        torch.testing.assert_close(trained[name], weight, atol=1e-5, rtol=1e-5)
    together, _ = reference(exp.override({"data.isolate_documents": False}))
    assert together != pytest.approx(losses, abs=1e-3), "attention across documents is something else"


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_packed_documents_stopped_and_resumed_equal_unbroken(snippets, tmp_path, gradient_checkpointing):
    changes = PACKED | {"model.gradient_checkpointing": gradient_checkpointing, "data.max_cached_batches": 3}
    exp = experiment(snippets, checkpoint_every=0).override(changes)
    _, recorder = train(exp, tmp_path / "whole")
    train(exp, tmp_path / "broken", stop_after=2)
    _, resumed = train(exp.override({"data.max_cached_batches": 0}), tmp_path / "broken")
    assert_identical(tmp_path / "whole", tmp_path / "broken")
    for name in ("train/loss", "validation/loss"):
        assert recorder.metrics(name)[6] == resumed.metrics(name)[6]


def test_phases_may_change_from_the_checkpoint_on_and_not_before(data, tmp_path):
    """24 samples lie behind the checkpoint of step 3."""
    early, late = ({"start": start, "weights": [0, 1]} for start in (23, 24))
    exp = experiment(data, checkpoint_every=0)
    train(exp, tmp_path / "broken", stop_after=3)
    shutil.copytree(tmp_path / "broken", tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"data.phases would change the weights .*before sample 24 as they were"):
        train(exp.override({"data.phases": [early]}), tmp_path / "broken")
    changed = exp.override({"data.phases": [late]})
    train(changed, tmp_path / "broken")
    train(changed, tmp_path / "whole")
    assert_identical(tmp_path / "whole", tmp_path / "broken")
    train(exp, tmp_path / "plain")
    with pytest.raises(AssertionError):
        assert_identical(tmp_path / "plain", tmp_path / "broken")
    with pytest.raises(CheckpointError, match="data.phases would change the weights of samples"):
        train(exp, tmp_path / "broken")


def test_stopped_and_resumed_equals_unbroken(data, tmp_path):
    exp = experiment(data, checkpoint_every=0, log_every=2)
    whole, recorder = train(exp, tmp_path / "whole")
    assert whole == Outcome(step=6, finished=True, saved_step=6)
    stopped, first = train(exp, tmp_path / "broken", stop_after=4)
    assert stopped == Outcome(step=4, finished=False, saved_step=4)
    resumed, second = train(exp, tmp_path / "broken")
    assert resumed.finished and second.events[0].step == 4
    assert_identical(tmp_path / "whole", tmp_path / "broken")
    for name in ("train/loss", "train/learning_rate", "train/gradient_norm", "experts/balance", "validation/loss"):
        assert recorder.metrics(name) == first.metrics(name) | second.metrics(name), name


def test_events_tell_the_run(data, tmp_path):
    _, recorder = train(experiment(data, log_every=3), tmp_path)
    kinds = [(event.kind, event.step) for event in recorder.events]
    assert kinds == [
        ("start", 0),
        ("train", 3),
        ("validation", 3),
        ("checkpoint", 3),
        ("train", 6),
        ("validation", 6),
        ("specialization", 6),
        ("checkpoint", 6),
        ("end", 6),
    ]
    start, logged = recorder.events[0].details, recorder.events[1]
    assert start["device"] == "cpu" and start["parameters"] > start["active_parameters"]
    assert start["tokens_per_step"] == 8 * 32 and start["backends"]["experts"] == "sorted"
    assert logged.metrics["train/tokens"] == 3 * 8 * 32
    assert logged.metrics["throughput/tokens_per_second"] > 0
    assert len(logged.expert_load) == 1 and sum(logged.expert_load[0]) == pytest.approx(1.0)


@pytest.mark.parametrize("changes", [{}, PACKED], ids=["stream", "packed"])
def test_validation_is_the_exact_mean_and_per_source(snippets, tmp_path, changes):
    """Against one sample at a time, with the final weights; 7 samples leave a last micro batch that is not full."""
    exp = experiment(snippets, validation_samples=7).override(changes)
    _, recorder = train(exp, tmp_path)
    model = exp.model.build()
    model.load_state_dict(read_checkpoint(tmp_path).load_model_state())
    model.eval()
    mixture = exp.data.build(split="validation")
    nats: dict[int, list[float]] = {0: [], 1: []}
    with torch.no_grad():
        for index in range(7):
            sample = mixture.batch([index])
            logits_NV = model(sample.inputs, documents=sample.documents).logits_BTV.flatten(0, 1)
            each_N = F.cross_entropy(logits_NV, sample.targets.flatten(), ignore_index=IGNORED, reduction="none")
            nats[int(sample.sources)] += each_N[sample.targets.flatten() != IGNORED].tolist()
    every = nats[0] + nats[1]
    assert (len(every) < 7 * 32) == bool(changes)
    assert recorder.metrics("validation/loss")[6] == pytest.approx(sum(every) / len(every), abs=1e-6)
    for source, group in nats.items():
        name = f"validation/loss/{mixture.source_names[source]}"
        assert recorder.metrics(name)[6] == pytest.approx(sum(group) / len(group), abs=1e-6)


def test_a_run_killed_before_its_last_words_still_says_them(data, tmp_path):
    exp = experiment(data)
    train(exp, tmp_path)
    outcome, recorder = train(exp, tmp_path)
    assert outcome == Outcome(step=6, finished=True, saved_step=6)
    assert [event.kind for event in recorder.events] == ["start", "validation", "end"]


def test_a_damaged_newest_checkpoint_is_passed_over_loudly(data, tmp_path):
    exp = experiment(data)
    train(exp, tmp_path)
    shutil.copytree(tmp_path / "checkpoints" / "step-00000006", tmp_path / "good" / "checkpoints" / "step-00000006")
    damaged = tmp_path / "checkpoints" / "step-00000006" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    _, recorder = train(exp, tmp_path)
    assert recorder.events[0].kind == "warning" and str(damaged) in recorder.events[0].details["message"]
    assert recorder.events[1].kind == "start" and recorder.events[1].step == 3
    assert_identical(tmp_path, tmp_path / "good")


def test_other_data_is_refused(data, tmp_path):
    exp = experiment(data)
    train(exp, tmp_path, stop_after=1)
    with pytest.raises(CheckpointError, match="was trained on other data than .*--fresh"):
        train(exp.override({"data.seed": 1}), tmp_path)


def test_another_shape_is_refused(data, tmp_path):
    exp = experiment(data)
    train(exp, tmp_path, stop_after=1)
    with pytest.raises(CheckpointError, match="look at model.moe.num_experts"):
        train(exp.override({"model.moe.num_experts": 6}), tmp_path)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_diverged_run_stops_and_saves_nothing_of_it(data, tmp_path, stage):
    exp = experiment(data, checkpoint_every=1, **{"optimizer.lr": 1e30, "parallel.zero_stage": stage})
    recorder = Recorder()
    with pytest.raises(TrainingError, match=r"the gradient of step \d is not finite: training diverged.*optimizer.lr"):
        trainer(exp, tmp_path, recorder).run()
    for folder in checkpoint_folders(tmp_path):
        assert all(tensor.isfinite().all() for tensor in tensors(folder).values()), folder


def test_a_parameter_left_out_of_the_loss_is_named(data, tmp_path):
    exp = experiment(data)
    model = exp.model.build()
    model.idle = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError, match="'idle' .* received no gradient on worker 0"):
        trainer(exp, tmp_path, Recorder(), model).run()


def test_noise_seeds_differ_in_every_argument():
    seeds = {noise_seed(*(int(i == j) for j in range(4))) for i in range(5)}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_keeps_float32_masters_across_a_resume(data, tmp_path, stage):
    exp = experiment(data, precision="bf16", checkpoint_every=0, **{"parallel.zero_stage": stage})
    train(exp, tmp_path / "whole")
    train(exp, tmp_path / "broken", stop_after=3)
    train(exp, tmp_path / "broken")
    assert_identical(tmp_path / "whole", tmp_path / "broken")
    weights = read_checkpoint(tmp_path / "whole").load_model_state()
    masters = weights["blocks.0.attention.qkv.weight"]
    assert masters.dtype == torch.float32 and not torch.equal(masters, masters.bfloat16().float())


def starved(data: Path, **training) -> Experiment:
    """Two tokens a forward pass and eight experts: most experts get nothing, and other ones on each worker."""
    exp = experiment(data, micro_batch_size=1, **training).override(NOISELESS)
    return exp.override({"data.sequence_length": 2, "model.moe.num_experts": 8})


def two_workers(data: Path, snippets: Path, root: Path) -> dict[int | str, dict[int, float]]:
    """In each of two workers: every stage unbroken, stopped and resumed, resumed from another stage, starved, and with
    packed documents."""
    losses: dict[int | str, dict[int, float]] = {}
    for stage in STAGES:
        exp = experiment(snippets, **{"parallel.num_workers": 2, "parallel.zero_stage": stage})
        _, recorder = train(exp.override(NOISELESS | PACKED), root / f"packed-{stage}")
        losses[f"packed-{stage}"] = recorder.metrics("train/loss")
        exp = starved(data, **{"parallel.num_workers": 2, "parallel.zero_stage": stage})
        _, recorder = train(exp, root / f"starved-{stage}")
        losses[f"starved-{stage}"] = recorder.metrics("train/loss")
        exp = experiment(data, **{"parallel.num_workers": 2, "parallel.zero_stage": stage}).override(NOISELESS)
        _, recorder = train(exp, root / f"whole-{stage}")
        losses[stage] = recorder.metrics("train/loss")
    for stage in STAGES:
        other = (stage + 1) % 4
        exp = experiment(data, **{"parallel.num_workers": 2, "parallel.zero_stage": stage}).override(NOISELESS)
        train(exp, root / f"broken-{stage}", stop_after=3)
        train(exp, root / f"broken-{stage}")
        if torch.distributed.get_rank() == 0:
            source = root / f"whole-{other}" / "checkpoints" / "step-00000003"
            shutil.copytree(source, root / f"moved-{stage}" / "checkpoints" / "step-00000003")
        torch.distributed.barrier()
        train(exp, root / f"moved-{stage}")
    return losses


def test_two_workers_at_every_zero_stage(data, snippets, tmp_path):
    exp = experiment(data).override(NOISELESS)
    losses, weights = reference(exp)
    starved_losses, _ = reference(starved(data))
    packed_losses, _ = reference(experiment(snippets).override(NOISELESS | PACKED))
    by_stage = run_workers(2, two_workers, data, snippets, tmp_path)[0]
    for stage in STAGES:
        assert list(by_stage[stage].values()) == pytest.approx(losses, abs=1e-6), f"stage {stage}"
        assert list(by_stage[f"packed-{stage}"].values()) == pytest.approx(packed_losses, abs=1e-6), f"stage {stage}"
        # Near 5.7 float32 numbers lie 4.8e-7 apart, and two tokens a step let roundings grow: six of them.
        assert list(by_stage[f"starved-{stage}"].values()) == pytest.approx(starved_losses, rel=5e-7), f"stage {stage}"
        trained = read_checkpoint(tmp_path / f"whole-{stage}").load_model_state()
        for name, weight in weights.items():
            torch.testing.assert_close(trained[name], weight, atol=1e-5, rtol=1e-5)
        assert_identical(tmp_path / f"whole-{stage}", tmp_path / f"broken-{stage}")
        moved = tensors(tmp_path / f"moved-{stage}")
        for name, tensor in tensors(tmp_path / f"whole-{stage}").items():
            torch.testing.assert_close(moved[name], tensor, atol=1e-5, rtol=1e-5)
    # one process goes on from a checkpoint of two workers that split everything
    shutil.copytree(tmp_path / "whole-3" / "checkpoints" / "step-00000003", tmp_path / "one/checkpoints/step-00000003")
    _, recorder = train(exp, tmp_path / "one")
    assert recorder.events[0].step == 3
    assert recorder.metrics("train/loss")[6] == pytest.approx(losses[5], abs=1e-6)


def on_gpu(data: Path, root: Path, stage: int, changes: dict) -> tuple[Recorder, Recorder]:
    """An unbroken run, and the second half of a broken one, in a process of its own: DeepSpeed keeps one device."""
    exp = experiment(data, checkpoint_every=0, **{"parallel.device": "cuda", "parallel.zero_stage": stage})
    exp = exp.override(changes)
    _, whole = train(exp, root / "whole")
    train(exp, root / "broken", stop_after=3)
    return whole, train(exp, root / "broken")[1]


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, PACKED], ids=["stream", "packed"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_on_a_gpu_in_bf16_resumed_equals_unbroken(snippets, tmp_path, stage, changes):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        whole, resumed = pool.submit(on_gpu, snippets, tmp_path, stage, changes).result()
    start = whole.events[0].details
    assert start["dtype"] == "bfloat16" and start["device"] == "cuda"
    _, expected = train(experiment(snippets).override(changes), tmp_path / "cpu")
    assert whole.metrics("validation/loss")[6] == pytest.approx(expected.metrics("validation/loss")[6], abs=0.05)
    assert resumed.events[0].step == 3
    assert resumed.metrics("train/loss")[6] == pytest.approx(whole.metrics("train/loss")[6], abs=1e-3)
