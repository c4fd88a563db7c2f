"""`blues prune` end to end: a smaller run that everything reads, replayed, resumed; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from blues import config as cfg
from blues.cli import main
from blues.cluster import session
from blues.experiment import Experiment
from blues.model.moe.pruning import read_recipe
from blues.training.checkpoint import latest_checkpoint, read_checkpoint, write_checkpoint
from tests.model.examples import lively
from tests.training.tiny import experiment, make_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run_dir(data, tmp_path_factory) -> Path:
    """A run of one checkpoint; its weights are drawn, not trained."""
    folder, tree = tmp_path_factory.mktemp("runs") / "big", experiment(data)
    write_checkpoint(
        folder,
        step=6,
        tokens=1,
        data_fingerprint="0" * 16,
        tree=cfg.dump(tree),
        model_state=lively(tree.model.build(seed=0)).state_dict(),
        optimizer_state={"embedding.weight/exp_avg": torch.zeros(1)},
        details={},
    )
    return folder


def prune(run_dir: Path, output: Path, *words: str) -> int:
    return main(["prune", "--checkpoint", str(run_dir), "--output", str(output), "--tokens", "400", *words])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run).load_model_state()


@pytest.mark.parametrize("action", ["remove", "mean_output", "merge", "cluster"])
def test_a_pruned_run_is_a_run_and_its_recipe_gives_the_same_bits(action, run_dir, tmp_path, capsys):
    assert prune(run_dir, tmp_path / "a", "--action", action, "--keep", "2", "--recipe", str(tmp_path / "r.yaml")) == 0
    out = capsys.readouterr().out
    assert "2/4" in out and "before" in out and "flops per token" in out and "[" in out
    report = json.loads((tmp_path / "a/pruning/report.json").read_text())
    assert report["sizes"]["after"]["parameters"] < report["sizes"]["before"]["parameters"]
    assert report["losses"].keys() == {"before", "after"}
    assert (tmp_path / "a/pruning/pruning.png").read_bytes().startswith(b"\x89PNG")
    assert read_recipe(tmp_path / "r.yaml") == read_recipe(tmp_path / "a/pruning/recipe.yaml")
    assert prune(run_dir, tmp_path / "b", "--action", action, "--replay", str(tmp_path / "r.yaml")) == 0
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    generate = ["generate", "--checkpoint", str(tmp_path / "a"), "--prompt", "def ", "--max-length", "3"]
    assert main(generate) == 0
    assert main(["evaluate", "--checkpoint", str(tmp_path / "a"), "--max-tokens", "60", "--json"]) == 0


def test_the_same_command_changes_nothing_and_another_is_refused(run_dir, tmp_path, capsys):
    output = tmp_path / "a"
    assert prune(run_dir, output, "--keep", "3") == 0
    before = weights(output)
    assert prune(run_dir, output, "--keep", "3") == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(output).items())
    assert prune(run_dir, output, "--keep", "2") == 2
    assert "holds another pruning" in capsys.readouterr().err
    assert prune(run_dir, output, "--keep", "2", "--fresh") == 0
    assert read_checkpoint(output).tree["model"]["moe"]["num_experts"] == 2


def test_attention_is_pruned_in_the_same_command(run_dir, tmp_path, capsys):
    assert prune(run_dir, tmp_path / "a", "--keep", "3", "--attention", "0.7", "--block", "8") == 0
    assert "the sparser attention alone costs" in capsys.readouterr().out
    assert "block_list" in str(read_checkpoint(tmp_path / "a").tree["model"]["attention"]["pattern"])
    assert prune(run_dir, tmp_path / "b", "--attention", "0.7", "--block", "8") == 0
    assert read_recipe(tmp_path / "b/pruning/recipe.yaml").layers == ()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "nothing to prune"),
        (["--keep", "1"], "top_k"),
        (["--keep", "9"], "cannot stay"),
        (["--keep", "2", "--criterion", "reep"], "Did you mean 'reap'"),
        (["--keep", "2", "--action", "delete"], "unknown pruning_action 'delete'"),
        (["--keep", "2", "--criterion", "naee", "--scope", "global"], "--scope layer"),
        (["--keep", "2", "--criterion", "alive"], "--dead"),
        (["--keep", "2", "--attention", "1.5"], "keep: must be above 0"),
        (["--keep", "2", "--tokens", "0"], "tokens: must be at least 1"),
        (["--replay", "nowhere.yaml"], "cannot read"),
        (["--keep", "2", "--data-cache-dir", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_get_one_sentence_and_nothing_is_written(words, sentence, run_dir, tmp_path, capsys):
    assert prune(run_dir, tmp_path / "a", *words) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_run_is_not_pruned_into_itself(run_dir, capsys):
    assert prune(run_dir, run_dir, "--keep", "2") == 2
    assert "give a new folder" in capsys.readouterr().err


@pytest.mark.ray
def test_recovery_trains_on_and_the_same_command_resumes(run_dir, tmp_path, capsys):
    output = tmp_path / "a"
    words = ["--keep", "2", "--recover-steps", "3", "--recover-lr", "0.001"]
    with session.connect("local", num_cpus=2, object_store_memory=200 * 2**20):
        assert prune(run_dir, output, *words) == 0
        assert "after 3 steps of recovery" in capsys.readouterr().out
        losses = json.loads((output / "pruning/report.json").read_text())["losses"]
        assert losses["recovered"] < losses["after"]
        newest = latest_checkpoint(output)
        assert newest is not None and newest.name == "step-00000003"
        assert prune(run_dir, output, *words) == 0  # finished before: nothing is trained again
    assert cfg.read(Experiment, output / "experiment.yaml").model.moe.num_experts == 2
    assert main(["generate", "--checkpoint", str(output), "--prompt", "def ", "--max-length", "3"]) == 0
