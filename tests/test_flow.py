"""The whole journey with the commands a person types: raw files, datasets, mixture, trained model, text, export."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from blues import load_model, sample_text
from blues.cli import main
from blues.cluster.session import connect
from blues.data.reading.standard_library import write_code, write_text

SMALL = [
    *("data.sequence_length=64", "data.tokenizer.vocab_size=512", "model.vocab_size=512", "model.max_seq_len=64"),
    *("model.dim=64", "model.num_layers=2", "model.attention.num_heads=2", "model.ffn_dim=128", "model.moe.ffn_dim=64"),
    *("training.global_batch_size=16", "training.validate_every=20", "training.validation_samples=16"),
    *("training.checkpoint_every=20", "training.schedule.warmup_steps=5"),
]
VOCABULARY = ["--vocab-size", "512"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with raw files, and one Ray for all commands."""
    folder = tmp_path_factory.mktemp("a journey")
    write_code(folder / "code", max_bytes=300_000)
    write_text(folder / "text.jsonl", max_bytes=150_000)
    with open(folder / "text.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "text"])
        for line in (folder / "text.jsonl").read_text(encoding="utf-8").splitlines():
            document = json.loads(line)
            rows.writerow([document["id"], document["text"]])
        rows.writerow(["no text in this row"])
    with connect("local", num_cpus=2, object_store_memory=200_000_000):
        yield folder


@pytest.mark.ray
def test_raw_files_to_generated_text(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, mix, run = (str(place / name) for name in ("data code", "data text", "mix", "run"))

    assert main(["prepare", "--input-dir", str(place / "code"), "--data-cache-dir", code, *VOCABULARY]) == 0
    assert main(["prepare", "--dataset", str(place / "text.csv"), "--data-cache-dir", text, *VOCABULARY]) == 0
    [rejected] = (place / "data text" / "versions" / "00001" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(rejected)["reason"] == "wrong number of fields"

    weights = ["--weights", "0.7", "0.3", "--strategy", "weighted"]
    assert main(["merge", "--datasets", code, text, *weights, "--output", mix, "--verify"]) == 0
    assert main(["verify", mix]) == 0

    train = ["train", "tiny", "--data-cache-dir", mix, "--run-dir", run, *SMALL, f"tracking.directory={place}/mlflow"]
    assert main([*train, "training.steps=40"]) == 0
    shown = capsys.readouterr().out
    assert "step 40/40" in shown and "validation loss" in shown and "finished 40 steps" in shown
    metrics = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["metrics"]["train/loss"] for line in metrics if "train/loss" in line["metrics"]}
    assert losses[40] < losses[10] < math.log(512) + 0.5
    values = {name: value for line in metrics for name, value in line["metrics"].items()}
    shares = [value for name, value in values.items() if "layer_01/load_" in name]
    assert len(shares) == 4 and sum(shares) == pytest.approx(1.0, abs=1e-6)
    assert {path.name for path in (place / "run" / "figures").iterdir()} >= {"loss.png", "expert_load.png"}

    assert main(["train", *train[1:], "training.steps=40"]) == 0  # again: it says that it is finished
    assert "has finished its 40 steps" in capsys.readouterr().out

    prompt = ["--prompt", "def ", "--max-length", "12", "--temperature", "0.8", "--top-p", "0.9", "--top-k", "50"]
    assert main(["generate", "--checkpoint", run, *prompt]) == 0
    generated = capsys.readouterr().out
    assert generated.startswith("def ") and len(generated) > 8
    model = load_model(run)
    continuation = sample_text(model, "def ", max_length=12, temperature=0.8, top_p=0.9, top_k=50)
    assert generated.rstrip("\n") == ("def " + continuation).rstrip("\n")

    assert main(["generate", "--checkpoint", run, "--eval-text", str(place / "text.csv")]) == 0
    assert main(["evaluate", "--checkpoint", run]) == 0
    assert "bits/byte" in capsys.readouterr().out

    exported = place / "exported"
    assert main(["export", "--checkpoint", run, "--output", str(exported)]) == 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(exported)("import os\n", return_tensors="pt")["input_ids"]
    assert tokens[0].tolist() == model.tokenizer.encode("import os\n")
    with torch.no_grad():
        torch.testing.assert_close(model.model(tokens).logits_BTV, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.ray
def test_bad_commands_are_one_sentence_and_leave_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = place / "bad"
    commands = [
        ["prepare", "--dataset", str(place / "absent.csv"), "--data-cache-dir", str(bad)],
        ["prepare", "--dataset", str(place / "text.csv"), "--text-column", "body", "--data-cache-dir", str(bad)],
        ["merge", "--datasets", str(place / "absent"), "--weights", "1", "--output", str(bad)],
        ["train", "tiny", "--data-cache-dir", str(place / "absent"), "--run-dir", str(bad)],
        ["train", "tyni", "--data-cache-dir", str(place / "absent"), "--run-dir", str(bad)],
        ["train", "tiny", "--run-dir", str(bad), "model.moe.topk=1"],
        ["generate", "--checkpoint", str(bad), "--prompt", "x"],
        ["evaluate", "--checkpoint", str(bad)],
        ["export", "--checkpoint", str(bad), "--output", str(bad / "out")],
        ["verify", str(bad)],
    ]
    for words in commands:
        assert main(words) == 2, words
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"blues {words[0]}: ") and "\n" not in error and "Traceback" not in error, error
        assert not bad.exists(), words
