"""Checkpoints: complete or not there, verified, readable anywhere."""

import json
import shutil

import pytest
import torch
from torch import nn

from blues.errors import CheckpointError
from blues.training import checkpoint as ck

TREE = {"name": "tiny", "model": {"dim": 3, "moe": {"num_experts": 2}}}


def write(run_dir, step, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = {"weight": torch.randn(4, 3, generator=generator), "bias": torch.randn(4, generator=generator)}
    states = {ck.state_key(name, "exp_avg"): torch.randn(t.shape, generator=generator) for name, t in model.items()}
    path = ck.write_checkpoint(
        run_dir,
        step=step,
        tokens=step * 10,
        data_fingerprint="abc",
        tree=TREE,
        model_state=model,
        optimizer_state=states,
        details={"world_size": 2},
    )
    return path, model, states


def test_what_was_written_is_read_bit_for_bit(tmp_path):
    path, model, states = write(tmp_path, 100)
    assert path == tmp_path / "checkpoints" / "step-00000100"
    read = ck.read_checkpoint(path)
    assert (read.step, read.tokens, read.data_fingerprint, read.tree) == (100, 1000, "abc", TREE)
    loaded = read.load_model_state()
    assert loaded.keys() == model.keys() and all(torch.equal(loaded[name], model[name]) for name in model)
    with read.open_optimizer() as file:
        assert all(torch.equal(file.get_tensor(key), states[key]) for key in states)
    assert json.loads((path / "checkpoint.json").read_text())["world_size"] == 2


def test_a_run_folder_gives_its_newest(tmp_path):
    write(tmp_path, 5)
    write(tmp_path, 20)
    assert ck.read_checkpoint(tmp_path).step == 20
    assert [folder.name for folder in ck.checkpoint_folders(tmp_path)] == ["step-00000005", "step-00000020"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped bit": (lambda p: flip(p / "model.safetensors"), "model.safetensors is damaged"),
    "truncated": (lambda p: (p / "optimizer.safetensors").write_bytes(b"abc"), "optimizer.safetensors has 3 bytes"),
    "missing file": (lambda p: (p / "experiment.yaml").unlink(), "experiment.yaml is missing"),
    "no record": (lambda p: (p / "checkpoint.json").unlink(), "checkpoint.json is missing"),
    "torn record": (lambda p: (p / "checkpoint.json").write_text('{"for'), "checkpoint.json cannot be read"),
    "another format": (lambda p: (p / "checkpoint.json").write_text('{"format": "x"}'), "is not a blues-checkpoint"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path, how):
    damage, words = DAMAGE[how]
    write(tmp_path, 10)
    newest, _, _ = write(tmp_path, 20)
    damage(newest)
    with pytest.raises(CheckpointError, match=words):
        ck.read_checkpoint(newest)
    told = []
    assert ck.latest_checkpoint(tmp_path, told.append) == tmp_path / "checkpoints" / "step-00000010"
    assert len(told) == 1 and "skipping a damaged checkpoint" in told[0] and "step-00000020" in told[0]


def test_a_damaged_folder_is_replaced_when_the_run_gets_there_again(tmp_path):
    path, _, _ = write(tmp_path, 10)
    flip(path / "model.safetensors")
    write(tmp_path, 10)
    assert ck.read_checkpoint(path).step == 10


def test_nothing_there(tmp_path):
    assert ck.latest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        ck.read_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        ck.read_checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
        ck.read_checkpoint(tmp_path)


def test_an_interrupted_write_is_not_a_checkpoint_and_is_swept_away(tmp_path):
    path, _, _ = write(tmp_path, 10)
    unfinished = path.with_name(".step-00000020.tmp")
    shutil.copytree(path, unfinished)
    assert ck.latest_checkpoint(tmp_path) == path
    ck.prune_checkpoints(tmp_path, keep=1)
    assert not unfinished.exists() and path.exists()


def test_pruning_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    ck.prune_checkpoints(tmp_path, keep=2)
    assert [folder.name for folder in ck.checkpoint_folders(tmp_path)] == ["step-00000003", "step-00000004"]


def test_pruning_keeps_the_one_just_written_beside_a_later_damaged_one(tmp_path):
    later, _, _ = write(tmp_path, 8)
    (later / ck.MODEL).write_bytes(b"damaged")
    written, _, _ = write(tmp_path, 6)
    ck.prune_checkpoints(tmp_path, keep=1, written=written)
    assert ck.latest_checkpoint(tmp_path) == written and ck.checkpoint_folders(tmp_path) == [written]


@pytest.mark.parametrize("content", ["[]", "3", '{"format": "blues-checkpoint", "version": 1}', "{"])
def test_a_record_that_is_none_is_damage_and_passed_over(tmp_path, content):
    good, _, _ = write(tmp_path, 1)
    bad, _, _ = write(tmp_path, 2)
    (bad / ck.RECORD).write_text(content)
    with pytest.raises(CheckpointError, match="checkpoint.json"):
        ck.read_checkpoint(bad)
    assert ck.latest_checkpoint(tmp_path) == good


def test_another_shape_names_the_tensor_both_shapes_and_the_key(tmp_path):
    path, _, _ = write(tmp_path, 1)
    read = ck.read_checkpoint(path)
    read.check_shapes(nn.Linear(3, 4), TREE)
    wanted = {"name": "tiny", "model": {"dim": 5, "moe": {"num_experts": 2}}}
    with pytest.raises(CheckpointError, match=r"'weight' has \[4, 3\] but the model wants \[4, 5\]; look at model.dim"):
        read.check_shapes(nn.Linear(5, 4), wanted)
    with pytest.raises(CheckpointError, match=r"'bias' has \[4\] but the model wants no such tensor"):
        read.check_shapes(nn.Linear(3, 4, bias=False), TREE)


def test_other_data_and_changed_phases_are_told_apart(tmp_path):
    path, _, _ = write(tmp_path, 10)
    read = ck.read_checkpoint(path)

    def tree(*starts):
        return {"data": {"path": "data/mix", "phases": [{"start": start, "weights": [1.0]} for start in starts]}}

    read.check_data("abc", 80, tree(100))
    with pytest.raises(CheckpointError, match=r"step-00000010 was trained on other data than 'data/mix'.*--fresh"):
        read.check_data("xyz", 80, tree(80))
    with pytest.raises(CheckpointError, match=r"data.phases would change the weights of .*before sample 80"):
        read.check_data("xyz", 80, tree(79))
