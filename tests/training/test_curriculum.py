"""Growing context: the same tokens in the same order, cut shorter; resumable bit for bit; plain in the end."""

from __future__ import annotations

import pytest
import torch

from blues.data.mixture.batches import Batch, rank_indices
from blues.errors import ConfigError
from blues.training.checkpoint import step_folder, write_checkpoint
from blues.training.curriculum import Curriculum, Stage
from blues.training.trainer import _Loop
from tests.training.test_trainer import assert_identical, read_checkpoint, snippets, tensors, train  # noqa: F401
from tests.training.tiny import experiment, make_dataset

STAGES = [{"until": 0.34, "length": 8}, {"until": 0.67, "length": 16}]
"""Of 6 steps: three of 8 tokens, two of 16, one of 32."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def seen(monkeypatch) -> list[Batch]:
    """Every batch that an update's forward pass reads."""
    batches: list[Batch] = []
    forward = _Loop._forward

    def watched(self, batch, **options):
        if "progress" in options:
            batches.append(batch)
        return forward(self, batch, **options)

    monkeypatch.setattr(_Loop, "_forward", watched)
    return batches


def test_rows_are_pieces_of_sequences_in_their_order():
    inputs = torch.arange(24).view(2, 12)
    batch = Batch(inputs, inputs + 1, torch.tensor([3, 5]), (inputs // 5).int(), None)
    rows = batch.cut(4)
    assert rows.inputs.tolist()[1:4] == [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert torch.equal(rows.targets, rows.inputs + 1) and torch.equal(rows.documents, (rows.inputs // 5).int())
    assert rows.sources.tolist() == [3, 3, 3, 5, 5, 5] and rows.languages is None


def test_lengths_grow_with_the_share_of_steps():
    stages = (Stage(until=0.34, length=8), Stage(until=0.67, length=16))
    curriculum = Curriculum(stages, steps=6, sequence_length=32)
    assert [curriculum.length_at(update) for update in range(7)] == [8, 8, 8, 16, 16, 32, 32]
    assert Curriculum((), steps=6, sequence_length=32).length_at(0) == 32


def test_every_update_reads_the_same_tokens_as_plain_training(data, tmp_path, seen):
    exp = experiment(data).override({"training.context": STAGES})
    _, recorder = train(exp, tmp_path)
    mixture = exp.data.build()
    assert [batch.inputs.shape[1] for batch in seen] == [8] * 12 + [16] * 8 + [32] * 4
    for number, batch in enumerate(seen):
        plain = mixture.batch(rank_indices(number // 4, number % 4, 0, 1, 2, 8))
        assert torch.equal(batch.inputs.flatten(), plain.inputs.flatten()), "tokens and their order"
        assert torch.equal(batch.targets.flatten(), plain.targets.flatten())
    assert list(recorder.metrics("train/tokens").values()) == [step * 8 * 32 for step in range(1, 7)]


def test_stopped_and_resumed_within_a_stage_equals_unbroken(snippets, tmp_path):  # noqa: F811
    packed = {"data.packing": "best_fit", "data.isolate_documents": True, "training.context": STAGES}
    exp = experiment(snippets, checkpoint_every=0).override(packed)
    _, whole = train(exp, tmp_path / "whole")
    parts: dict[int, float] = {}
    for stop in (2, 4, None):
        _, recorder = train(exp, tmp_path / "broken", stop_after=stop)
        parts |= recorder.metrics("train/loss")
    assert_identical(tmp_path / "whole", tmp_path / "broken")
    assert parts == whole.metrics("train/loss")


def test_after_the_last_stage_training_is_the_plain_one(data, tmp_path):
    """Plain training that goes on from the checkpoint behind the last stage ends with the same bits."""
    exp, plain = experiment(data, checkpoint_every=5).override({"training.context": STAGES}), experiment(data)
    train(exp, tmp_path / "grown")
    there = step_folder(tmp_path / "grown", 5)
    checkpoint, state = read_checkpoint(there), tensors(there)
    model = checkpoint.load_model_state()
    write_checkpoint(
        tmp_path / "plain",
        step=5,
        tokens=checkpoint.tokens,
        data_fingerprint=checkpoint.data_fingerprint,
        tree=checkpoint.tree,
        model_state=model,
        optimizer_state={name: value for name, value in state.items() if name not in model},
        details={},
    )
    train(plain, tmp_path / "plain")
    assert_identical(tmp_path / "grown", tmp_path / "plain")


def test_stages_that_make_no_sense_are_refused(data):
    exp = experiment(data)
    for stages, words in (
        ([{"until": 0.5, "length": 12}], r"training.context\[0\].length: 12 .*divide it; nearest that does: 8"),
        ([{"until": 0.5, "length": 32}], "must be shorter than data.sequence_length=32"),
        ([{"until": 1.0, "length": 8}], "after the last stage come whole sequences"),
        ([{"until": 0.5, "length": 0}], "at least 1 token"),
        ([{"until": 0.5, "length": 8}, {"until": 0.4, "length": 16}], r"context\[1\].until: 0.4 must be above"),
        ([{"until": 0.5, "length": 16}, {"until": 0.7, "length": 8}], r"context\[1\].length: 8 must be above"),
    ):
        with pytest.raises(ConfigError, match=words):
            exp.override({"training.context": stages})
