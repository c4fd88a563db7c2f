"""Retrieval and tracking: a reader that copies perfectly is always right, one that guesses is at chance."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from blues.errors import ConfigError
from blues.evaluation.long_context import held_out
from blues.evaluation.retrieval import Retrieval, Script, Task, Tracking, plain_text, score, wilson
from blues.model.transformer import ModelOutput
from tests.evaluation.stores import make_store
from tests.inference.models import TINY, tiny, uniform_model, wrap

CONFIG = TINY.replace(max_seq_len=128)
TASKS = [Retrieval.Config(samples=6, depths=3), Tracking.Config(samples=6, depths=3, hops=2)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    words = ["def main(argument):\n    return argument + 1\n\n"] * 40
    path = make_store(tmp_path_factory.mktemp("data") / "store", train=words, validation=words)
    return held_out(wrap(uniform_model(), CONFIG), str(path))


class Reader(nn.Module):
    """Reads `name = value` lines, and follows names until no line says more. `hops` limits how far."""

    def __init__(self, script: Script, hops: int) -> None:
        super().__init__()
        self.script, self.hops, self.weight = script, hops, nn.Parameter(torch.zeros(1))

    def forward(self, tokens_BT, *, num_logits: int) -> ModelOutput:
        logits_BTV = torch.zeros(len(tokens_BT), 1, TINY.vocab_size)
        for row, tokens in enumerate(tokens_BT.tolist()):
            logits_BTV[row, -1, self._follow(tokens)] = 5.0
        return ModelOutput(logits_BTV, None, ())

    def _follow(self, tokens: list[int]) -> int:
        script, known = self.script, {}
        equals, newline = script.equals, script.newline
        lines = [at for at in range(len(tokens)) if tokens[at : at + len(equals)] == equals]
        for at in lines[:-1]:
            begin = max(place for place in range(at) if tokens[place : place + len(newline)] == newline)
            known[tuple(tokens[begin + len(newline) : at])] = tokens[at + len(equals)]
        begin = max(place for place in range(lines[-1]) if tokens[place : place + len(newline)] == newline)
        name = tuple(tokens[begin + len(newline) : lines[-1]])
        if name[: len(script.prints)] == tuple(script.prints):
            name = name[len(script.prints) :]
        value = known[name]
        for _ in range(self.hops):
            value = known.get((value,), value)
        return value


@pytest.mark.parametrize("config", TASKS, ids=["retrieval", "tracking"])
def test_perfect_reading_scores_one_and_guessing_scores_chance(config, data):
    loaded = wrap(uniform_model(), CONFIG)
    task: Task = config.build()
    reader = wrap(Reader(Script.of(loaded.tokenizer), hops=2), CONFIG)
    report, guessed = task.run(reader, data), task.run(loaded, data)
    assert report.lengths == guessed.lengths and report.lengths[-1] == 128
    for length in report.lengths:
        assert report.at(length).accuracy == 1.0 and report.at(length).said == report.at(length).count == 18
        assert guessed.at(length).accuracy == pytest.approx(guessed.chance)
        assert guessed.at(length).nats / 18 == pytest.approx(-np.log(guessed.chance))
        assert guessed.at(length).said / 18 == pytest.approx(1 / TINY.vocab_size)
    tree, table = report.to_tree(), report.table()
    assert len(tree["cells"]) == 3 * len(report.lengths) and "100%" in table and "at 50%" in table
    assert report.metrics()[f"{task.name}/128/accuracy"] == 1.0


def test_copying_what_followed_before_does_not_solve_tracking(data):
    task = Tracking.Config(samples=8, depths=2).build()
    reader = wrap(Reader(Script.of(wrap(uniform_model()).tokenizer), hops=0), CONFIG)
    report = task.run(reader, data)
    assert report.at(128).accuracy == pytest.approx(report.chance) and report.at(128).said == 0


@pytest.mark.parametrize("config", TASKS, ids=["retrieval", "tracking"])
def test_puzzles_have_their_length_follow_from_the_seed_and_put_the_answer_at_its_depth(config, data):
    loaded = wrap(uniform_model(), CONFIG)
    script, tokens_N = Script.of(loaded.tokenizer), plain_text(data, loaded.tokenizer.eot_id)
    task: Task = config.build()
    for length in (100, 128):
        places = []
        for depth in (0.0, 0.5, 1.0):
            text_T, answers = task.text(script, tokens_N, length, depth, 3)
            assert len(text_T) == length and len(set(answers)) == task.num_answers()
            again, _ = task.text(script, tokens_N, length, depth, 3)
            assert np.array_equal(text_T, again)
            other, _ = task.text(script, tokens_N, length, depth, 4)
            assert not np.array_equal(text_T, other)
            assert loaded.tokenizer.eot_id not in text_T
            places.append(int(np.flatnonzero(text_T == answers[0])[-1]))
        assert places[0] < places[1] < places[2]
    seeded = config.replace(seed=1).build().text(script, tokens_N, 128, 0.5, 3)[0]
    assert not np.array_equal(seeded, task.text(script, tokens_N, 128, 0.5, 3)[0])


def test_a_real_model_gets_the_same_figures_in_any_batches(data):
    loaded = tiny(max_seq_len=128)
    one, many = (Retrieval.Config(samples=5, depths=2, batch_size=size).build().run(loaded, data) for size in (1, 4))
    for left, right in zip(one.cells, many.cells, strict=True):
        assert left.chosen == right.chosen and left.nats == pytest.approx(right.nats, rel=1e-4)


def test_ties_count_in_part():
    logits_BV = torch.tensor([[1.0, 1.0, 0.0, 2.0], [3.0, 1.0, 0.0, 2.0]])
    chosen, said, nats = score(logits_BV, torch.tensor([[0, 1], [0, 1]])).tolist()
    assert (chosen, said) == (1.5, 1.0)
    assert nats == pytest.approx(np.log(2) + np.log1p(np.exp(-2)))


def test_the_wilson_interval_holds_the_share_and_stays_within_zero_and_one():
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-3))
    low, high = wilson(5, 10)
    assert low == pytest.approx(1 - high) and 0.2 < low < 0.5


def test_what_does_not_fit_is_refused(data):
    loaded = wrap(uniform_model(), CONFIG)
    for config, words in (
        (Retrieval.Config(lengths=(256,)), "sees 128 tokens at once, got 256"),
        (Retrieval.Config(lengths=(16,)), r"a puzzle takes \d+ tokens, more than a text of 16"),
        (Retrieval.Config(keys=100), "different words and the vocabulary has"),
    ):
        with pytest.raises(ConfigError, match=words):
            config.build().run(loaded, data)
    for make in (lambda: Retrieval.Config(keys=1), lambda: Tracking.Config(hops=0), lambda: Tracking.Config(depths=0)):
        with pytest.raises(ConfigError):
            make()


def test_single_letters_serve_where_words_are_few():
    tokenizer = SimpleNamespace(
        n_vocab=6, eot_id=5, decode_bytes=lambda ids: [b"a", b"=", b" bc", b"word", b"\n"][ids[0]], encode=lambda _: [4]
    )
    assert Script.of(tokenizer).words_W.tolist() == [0, 2, 3]
