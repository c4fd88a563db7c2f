"""Loading: every kind of folder gives the same model, and every kind of damage one clear sentence."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
import yaml

import blues
from blues import config as cfg
from blues.data.tokenizer import Tokenizer
from blues.errors import CheckpointError, ConfigError
from blues.inference.loading import choose_dtype, load_model
from blues.model.huggingface import export_huggingface
from tests.inference.models import TINY, TOKENIZER, tree_of, write_run

TOKENS = torch.tensor([[1, 2, 3, 250, 7]])


def logits(loaded) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.model(TOKENS).logits_BTV


def test_a_run_a_checkpoint_and_an_export_give_the_same_model(tmp_path):
    write_run(tmp_path / "run", step=2, seed=1)
    folder = write_run(tmp_path / "run", step=5, seed=2)
    original = TINY.build(seed=2).eval()
    run, checkpoint = load_model(tmp_path / "run"), load_model(str(folder))
    assert (run.step, checkpoint.step) == (5, 5)
    for loaded in (run, checkpoint):
        state = loaded.model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in original.state_dict().items())
        torch.testing.assert_close(logits(loaded), original(TOKENS).logits_BTV)
    assert run.tokenizer.config == TOKENIZER and run.sampling.max_length == 7
    assert not run.model.training and not any(p.requires_grad for p in run.model.parameters())
    export_huggingface(run.model, run.tokenizer, tmp_path / "export")
    exported = load_model(tmp_path / "export")
    torch.testing.assert_close(logits(exported), logits(run))
    assert exported.tokenizer.config == TOKENIZER and exported.step is None


def test_the_words_of_the_readme(tmp_path):
    write_run(tmp_path)
    model = blues.load_model(tmp_path)
    text = blues.sample_text(model, "def ", max_length=5, temperature=0)
    assert text == blues.sample_text(model, "def ", max_length=5, top_k=1)


def test_the_newest_good_checkpoint_of_a_run_is_taken(tmp_path):
    write_run(tmp_path, step=1)
    newest = write_run(tmp_path, step=2)
    flip_byte(newest / "model.safetensors")
    assert load_model(tmp_path).step == 1


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint at .*nowhere"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="checkpoint.json is missing"):
        load_model(tmp_path)
    folder = write_run(tmp_path / "run")
    damaged = shutil.copytree(folder, tmp_path / "flipped")
    flip_byte(damaged / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        load_model(damaged)
    damaged = shutil.copytree(folder, tmp_path / "cut")
    (damaged / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors has .* bytes, expected"):
        load_model(damaged)


def rewrite_tree(folder: Path, tree: object) -> None:
    """Replace a checkpoint's recorded configuration and make its checksum fit."""
    content = yaml.safe_dump(tree).encode()
    (folder / "experiment.yaml").write_bytes(content)
    record = json.loads((folder / "checkpoint.json").read_text())
    record["files"]["experiment.yaml"] = {"bytes": len(content), "xxh3": xxhash.xxh3_128_hexdigest(content)}
    (folder / "checkpoint.json").write_text(json.dumps(record))


def test_a_checkpoint_of_another_shape_than_its_settings_is_refused(tmp_path):
    folder = write_run(tmp_path)
    rewrite_tree(folder, tree_of(TINY.replace(dim=64)))
    with pytest.raises(CheckpointError, match=r"embedding.weight.*\[320, 32\].*\[320, 64\]"):
        load_model(folder)


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({}, "model"),
        ([], "experiment.yaml"),
        ({"model": {**cfg.dump(TINY), "wings": 2}, "data": {"tokenizer": {}}}, "wings"),
        ({"model": cfg.dump(TINY), "data": {"tokenizer": {"vocab_size": 5}}}, "vocab_size"),
        ({"model": cfg.dump(TINY), "data": {"tokenizer": cfg.dump(Tokenizer.Config(vocab_size=400))}}, "400 ids"),
    ],
    ids=["empty", "list", "unknown key", "bad value", "tokenizer too large"],
)
def test_settings_that_describe_no_model_are_refused(tmp_path, tree, reason):
    folder = write_run(tmp_path)
    rewrite_tree(folder, tree)
    with pytest.raises(CheckpointError, match=reason):
        load_model(folder)


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_pickled_code_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "run")
    content = pickle.dumps(Bomb())
    (folder / "model.safetensors").write_bytes(content)
    record = json.loads((folder / "checkpoint.json").read_text())
    record["files"]["model.safetensors"] = {"bytes": len(content), "xxh3": xxhash.xxh3_128_hexdigest(content)}
    (folder / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError):
        load_model(folder)
    (folder / "experiment.yaml").write_text("!!python/object/apply:builtins.open [exploded, w]")
    with pytest.raises(CheckpointError):
        load_model(folder)
    assert not (tmp_path / "exploded").exists()


def test_an_export_that_blues_did_not_write_or_that_is_damaged_is_refused(tmp_path):
    write_run(tmp_path / "run")
    loaded = load_model(tmp_path / "run")
    export_huggingface(loaded.model, loaded.tokenizer, tmp_path / "export")
    config = json.loads((tmp_path / "export/config.json").read_text())
    del config["blues_tokenizer"]
    (tmp_path / "export/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="blues export"):
        load_model(tmp_path / "export")
    (tmp_path / "export/model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(tmp_path / "export")


def test_devices_and_precisions(tmp_path):
    write_run(tmp_path)
    assert load_model(tmp_path, device="cpu", precision="bf16").model.embedding.weight.dtype == torch.bfloat16
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ConfigError, match=device):
            load_model(tmp_path, device=device)
    with pytest.raises(ConfigError, match="bf61"):
        load_model(tmp_path, precision="bf61")


def test_the_whole_vocabulary_hides_its_unused_ids(tmp_path):
    from tests.inference.models import uniform_model, wrap

    loaded = wrap(uniform_model(320))
    assert loaded.allowed_V.nonzero().flatten().tolist() == list(range(300))
    whole = Tokenizer()
    config = TINY.replace(vocab_size=200_064)  # rounded up, as models do
    big = type(loaded)(loaded.model, whole, config, tmp_path)
    forbidden = (~big.allowed_V).nonzero().flatten().tolist()
    assert forbidden == [199_998, *range(200_000, 200_064)]
