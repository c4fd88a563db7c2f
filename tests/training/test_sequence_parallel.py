"""Sequences shared by workers: the collectives, and runs that equal those of one worker.

Legend: B batch, T tokens of the whole sequence, t of a slice, W workers of a group, H heads, h of a worker, C channels.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from blues.errors import ConfigError
from blues.experiment import Experiment
from blues.training.checkpoint import read_checkpoint
from blues.training.parallel import Parallel
from blues.training.sequence_parallel import gather_tokens, heads_of_all_tokens, tokens_of_all_heads
from blues.training.trainer import Trainer
from tests.training.test_trainer import NOISELESS, assert_identical, train
from tests.training.tiny import experiment, make_dataset, run_workers

B, T, H, C = 2, 6, 4, 3
Events = list[tuple[str, dict[str, float]]]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


def whole_tensor(group: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The same on all workers of a group."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(group), dtype=torch.float64)


def collectives() -> None:
    """Each collective and its gradient against the whole tensors, which every worker of a group makes."""
    size = 2
    with (
        Parallel.Config(device="cpu", num_workers=dist.get_world_size(), sequence_parallel_size=size)
        .build()
        .join() as r
    ):
        assert r.data_rank == r.rank // size and r.data_world_size == r.world_size // size
        group, part = r.sequence_group, r.rank % size
        assert group is not None
    x_BTHC = whole_tensor(r.data_rank, (B, T, H, C))
    tokens, heads = slice(part * T // size, (part + 1) * T // size), slice(part * H // size, (part + 1) * H // size)

    x = x_BTHC[:, tokens].clone().requires_grad_()
    y_BThC = heads_of_all_tokens(x, group)
    assert torch.equal(y_BThC, x_BTHC[:, :, heads])
    weight_BTHC = whole_tensor(r.data_rank + 10, (B, T, H, C))
    (y_BThC * weight_BTHC[:, :, heads]).sum().backward()
    assert torch.equal(x.grad, weight_BTHC[:, tokens])

    x = x_BTHC[:, :, heads].clone().requires_grad_()
    y_BtHC = tokens_of_all_heads(x, group)
    assert torch.equal(y_BtHC, x_BTHC[:, tokens])
    (y_BtHC * weight_BTHC[:, tokens]).sum().backward()
    assert torch.equal(x.grad, weight_BTHC[:, :, heads])

    x = x_BTHC[:, tokens].clone().requires_grad_()
    y_BTHC = gather_tokens(x, group)
    assert torch.equal(y_BTHC, x_BTHC)
    (y_BTHC * weight_BTHC * (1 + part)).sum().backward()  # every worker has a loss of its own
    torch.testing.assert_close(x.grad, weight_BTHC[:, tokens] * sum(range(1, size + 1)))


SHARED = {"training.parallel.num_workers": 2, "training.parallel.sequence_parallel_size": 2}
RUNS = {
    "plain": {},
    "documents": {"data.isolate_documents": True, "data.packing": "best_fit"},
    "window": {"model.attention.pattern": "sliding_window", "model.attention.pattern.window": 10},
    "sequence": {"model.moe.load_balancing_scope": "sequence", "model.gradient_checkpointing": True},
    "global": {"model.moe.load_balancing_scope": "global_batch", "training.micro_batch_size": 8},
    "curriculum": {"training.context": [{"until": 0.5, "length": 16}]},
    "zero3": {"training.parallel.zero_stage": 3, "data.isolate_documents": True},
    "zero0": {"training.parallel.zero_stage": 0},
}
"""Changes to both runs."""
COMMON = NOISELESS | {
    "training.steps": 3,
    "model.moe.load_balancing_weight": 0.5,
    "training.specialization.probe_samples": 3,
    "training.optimizer.eps": 1e-4,
}
COMPARED = ("train/", "validation/", "experts/")


def changed(data: Path, name: str, num_workers: int) -> Experiment:
    workers = SHARED | {"training.parallel.num_workers": num_workers}
    return experiment(data).override(COMMON | RUNS[name] | (workers if num_workers > 1 else {}))


def runs(data: Path, folder: Path, names: tuple[str, ...]) -> dict[str, Events]:
    """Train each in these processes; the events of the first worker."""
    events = {}
    for name in names:
        _, recorder = train(changed(data, name, dist.get_world_size()), folder / name)
        events[name] = [(event.kind, event.metrics) for event in recorder.events]
    return events


def assert_equal_runs(data: Path, folder: Path, events: dict[str, Events]) -> None:
    """What the workers that share sequences did, against one worker."""
    for name, theirs in events.items():
        _, recorder = train(changed(data, name, 1), folder / "whole" / name)
        kinds = [(event.kind, event.metrics) for event in recorder.events]
        assert [kind for kind, _ in theirs] == [kind for kind, _ in kinds]
        for (_, found), (_, ours) in zip(theirs, kinds, strict=True):
            compared = {key: value for key, value in ours.items() if key.startswith(COMPARED)}
            assert {key: found[key] for key in compared} == pytest.approx(compared, abs=1e-6, rel=1e-6), name
        shared, whole = (read_checkpoint(folder / kind / name).load_model_state() for kind in ("shared", "whole"))
        torch.testing.assert_close(shared, whole, atol=1e-6, rtol=1e-6)


def broken_and_unbroken(data: Path, folder: Path) -> None:
    exp = experiment(data, steps=2, checkpoint_every=0).override(SHARED)
    train(exp, folder / "unbroken")
    train(exp, folder / "broken", stop_after=1)
    train(exp, folder / "broken")


def everything(data: Path, folder: Path) -> dict[str, Events]:
    """In one start of the workers, which takes longer than the rest."""
    collectives()
    broken_and_unbroken(data, folder)
    return runs(data, folder / "shared", ("plain", "documents", "window", "sequence"))


@pytest.fixture(scope="module")
def two(data, tmp_path_factory) -> tuple[Path, dict[str, Events]]:
    """Where two workers trained, and the events. They have checked the collectives."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run_workers(2, everything, data, folder)[0]


def test_two_workers_that_share_sequences_are_one(data, two):
    assert_equal_runs(data, *two)


def test_a_run_with_noise_resumes_bit_for_bit(two):
    assert_identical(two[0] / "unbroken", two[0] / "broken")


@pytest.mark.slow
def test_collectives_within_two_groups(data):
    run_workers(4, collectives)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "names"),
    [(2, ("global", "curriculum", "zero0", "zero3")), (4, ("documents", "window", "sequence"))],
)
def test_further_runs_are_those_of_one_worker(data, tmp_path, world_size, names):
    events = run_workers(world_size, runs, data, tmp_path / "shared", names, timeout=240)[0]
    assert_equal_runs(data, tmp_path, events)


def test_workers_that_do_not_make_equal_groups_are_refused():
    with pytest.raises(ConfigError, match="divide num_workers=3 into equal groups, got 2"):
        Parallel.Config(num_workers=3, sequence_parallel_size=2)
    with pytest.raises(ConfigError, match="got 0"):
        Parallel.Config(sequence_parallel_size=0)


def test_the_batch_is_spread_over_groups():
    parallel = Parallel.Config(num_workers=4, sequence_parallel_size=2)
    assert Trainer.Config(global_batch_size=12, micro_batch_size=2, parallel=parallel).accumulation == 3
    with pytest.raises(ConfigError, match="num_workers 4 / parallel.sequence_parallel_size 2; nearest that fits: 8"):
        Trainer.Config(global_batch_size=10, micro_batch_size=4, parallel=parallel)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.sequence_length": 31}, "data.sequence_length=31 is not a multiple of training.parallel.seq"),
        ({"training.context": [{"until": 0.5, "length": 1}]}, r"training.context\[0\].length=1 is not a multiple"),
        ({"model.attention.num_heads": 3}, "num_heads=3 is not a multiple"),
        ({"model.attention.num_kv_heads": 2}, "num_kv_heads is 2; set it to 1"),
        ({"model.attention.pattern": "adaptive_window"}, "adaptive_window, which learns a span"),
        ({"model.attention.pattern": "prefix_syntax"}, "prefix_syntax, which reads a tree"),
        ({"model.sequence_chunk": 16}, "model.sequence_chunk, which cuts sequences too"),
        ({"model.depth": "early_exit"}, "model.depth=early_exit"),
        ({"model.moe.router": "expert_choice"}, "moe.router=expert_choice, which lets each expert choose"),
        ({"model.moe.router": "threshold"}, "moe.router=threshold, whose cut-offs"),
        ({"model.moe.router": "relu"}, "moe.router=relu, which has a penalty"),
        ({"model.moe.router": "document_pools"}, "moe.router=document_pools, which sums"),
        ({"model.moe.rules": ["capacity_by_weight"]}, "the rule capacity_by_weight of moe.rules"),
        ({"model.moe.rules": ["skip_light"]}, "skip_light of moe.rules with beta=null, the median"),
    ],
)
def test_what_looks_at_whole_sequences_is_refused(data, changes, words):
    experiment(data).override(changes)
    with pytest.raises(ConfigError, match=words):
        experiment(data).override(changes | SHARED)
