"""The report: per source, over experts, as a table and as JSON; and what cannot be evaluated."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from blues.data.merging.merge import merge, open_dataset
from blues.data.tokenizer import Tokenizer
from blues.errors import ConfigError, DataError
from blues.evaluation.perplexity import byte_lengths, score_tokens
from blues.evaluation.suite import Evaluation, read_text, recorded_dataset
from tests.evaluation.stores import make_store
from tests.inference.models import TINY, tiny, tree_of, uniform_model, wrap

WORDS = ["def main():\n    return 1\n", "class A:\n    pass\n", "The blues is a music genre.\n"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    code = make_store(folder / "code", train=WORDS[:2] * 20, validation=WORDS[:2] * 8)
    text = make_store(folder / "text", train=WORDS[2:] * 20, validation=WORDS[2:] * 5)
    return merge([code, text], folder / "both", weights=[0.7, 0.3])


def evaluation(**changes) -> Evaluation:
    return Evaluation(Evaluation.Config(**changes))


def test_each_source_is_scored_by_itself_and_mixed_by_weight(dataset):
    loaded = tiny(1)
    report = evaluation(max_tokens=0).dataset(loaded, dataset)
    for result, store in zip(report.results, dataset.stores, strict=True):
        tokens = store.read("validation", 0, store.num_tokens("validation"))
        lengths = byte_lengths(loaded.tokenizer)
        assert result.score == score_tokens(loaded.model, tokens, context=48, byte_lengths_V=lengths)
        assert result.score.tokens == result.available - 1 == len(tokens) - 1
        assert result.score.bytes == store.text_bytes("validation") - lengths[tokens[0]]
    code, text = report.results
    assert report.cross_entropy == pytest.approx(0.7 * code.score.cross_entropy + 0.3 * text.score.cross_entropy)
    both = sum(r.weight * r.score.bytes / r.score.tokens for r in report.results)
    assert report.bits_per_byte == pytest.approx(report.cross_entropy / math.log(2) / both)
    low, high = sorted(r.score.bits_per_byte for r in report.results)
    assert low < report.bits_per_byte < high
    assert report.unigram is not None and 0 < report.unigram.own <= report.unigram.trained


def test_experts_are_counted_over_the_scored_tokens(dataset):
    report = evaluation(max_tokens=0, stride=5).dataset(tiny(1), dataset)
    assert report.experts is not None
    assert report.experts.layers == (1,) and report.experts.tokens == report.total.tokens
    assert np.sum(report.experts.load_LE, axis=1) == pytest.approx([1.0])
    assert report.experts.balance_L[0] == pytest.approx(4 * max(report.experts.load_LE[0]) - 1)
    dense = evaluation().dataset(tiny(1, moe=None), dataset)
    assert dense.experts is None and "Experts" not in dense.table()
    with pytest.raises(ConfigError, match="--figure"):
        dense.draw_experts("experts.png")


def test_the_report_is_json_and_a_table(dataset):
    report = evaluation(max_tokens=0).dataset(tiny(1), dataset)
    tree = json.loads(json.dumps(report.to_tree(), allow_nan=False))
    assert set(tree["sources"]) == {"code", "text"} and tree["sources"]["code"]["weight"] == pytest.approx(0.7)
    assert tree["perplexity"] == pytest.approx(math.exp(tree["cross_entropy"]))
    assert tree["experts"][0]["layer"] == 1 and sum(tree["experts"][0]["load"]) == pytest.approx(1)
    assert tree["unigram"]["own"] == report.unigram.own
    table = report.table()
    lines = table.splitlines()
    assert lines[1].split() == ["source", "weight", "tokens", "nats/token", "perplexity", "bits/byte"]
    assert lines[2].split()[:2] == ["code", "0.700"] and lines[4].split()[0] == "mixture"
    assert "Without context" in table and "MaxVio" in table and "e3" in table
    assert "evenly spread" not in table


def test_a_limit_scores_part_of_each_source_and_says_so(dataset):
    report = evaluation(max_tokens=60, context=20).dataset(tiny(1), dataset)
    for result in report.results:
        assert 40 <= result.score.tokens <= 80
        assert f"{result.name}: {result.score.tokens} of {result.available} tokens, evenly spread." in report.table()


def test_a_text_is_scored_whole_whatever_the_limit():
    loaded = wrap(uniform_model(), TINY.replace(moe=None))
    text = "Blues " * 50
    report = evaluation(max_tokens=3).text(loaded, text, "blues.txt")
    assert report.total.tokens == len(loaded.tokenizer.encode(text)) - 1
    assert report.cross_entropy == pytest.approx(math.log(320), rel=1e-6)
    assert report.unigram is None and "'blues.txt'" in report.table()
    for short in ("", "a"):
        with pytest.raises(ConfigError, match="at least 2"):
            evaluation().text(loaded, short)


def test_what_cannot_be_scored_is_named(tmp_path, dataset):
    loaded = tiny(1)
    other = make_store(tmp_path / "o", train=["a"], validation=["b"], tokenizer=Tokenizer.Config(vocab_size=400))
    with pytest.raises(DataError, match="vocabulary of 400 ids and the model reads 300.*--vocab-size 300"):
        evaluation().dataset(loaded, open_dataset(other))
    empty = make_store(tmp_path / "e", train=["a"], validation=[])
    with pytest.raises(DataError, match="validation split of dataset 'e' holds 0 token"):
        evaluation().dataset(loaded, open_dataset(empty))
    with pytest.raises(DataError, match="unknown split 'validaton'.*'validation'"):
        evaluation(split="validaton").dataset(loaded, dataset)
    with pytest.raises(ConfigError, match="sees 48 tokens at once, got 100"):
        evaluation(context=100).dataset(loaded, dataset)
    with pytest.raises(ConfigError, match="stride"):
        evaluation(stride=49).dataset(loaded, dataset)


@pytest.mark.parametrize(
    "changes", [{"batch_size": 0}, {"max_tokens": -1}, {"context": -1}, {"stride": -5}, {"context": 4, "stride": 5}]
)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ConfigError, match=list(changes)[-1]):
        Evaluation.Config(**changes)


def test_a_source_of_weight_zero_is_left_out(tmp_path):
    first = make_store(tmp_path / "a", train=WORDS, validation=WORDS)
    second = make_store(tmp_path / "b", train=WORDS, validation=[])
    report = evaluation().dataset(tiny(0), merge([first, second], tmp_path / "m", weights=[1, 0]))
    assert [result.name for result in report.results] == ["a"]


def test_the_runs_own_settings_and_data_are_the_defaults(tmp_path, dataset):
    tree = {**tree_of(data_path=str(dataset.path)), "evaluation": {"batch_size": 3}}
    loaded = wrap(uniform_model(), tree=tree)
    assert Evaluation.of(loaded, stride=None, max_tokens=9).config == Evaluation.Config(batch_size=3, max_tokens=9)
    assert recorded_dataset(loaded).fingerprint == dataset.fingerprint
    gone = wrap(uniform_model(), tree=tree_of(data_path=str(tmp_path / "gone")))
    for unknown in (gone, wrap(uniform_model())):
        with pytest.raises(DataError, match="--data-cache-dir"):
            recorded_dataset(unknown)


def test_text_comes_from_a_file_or_is_the_words(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("naïve\n", encoding="utf-8")
    assert read_text(str(file)) == ("naïve\n", str(file))
    for words in ("To be, or not to be", "one word", "word", "a/b testing is done. ", "x" * 5000, "end.\0"):
        assert read_text(words) == (words, "text")
    for path in ("missing.txt", "data/missing", str(tmp_path / "missing")):
        with pytest.raises(DataError, match="there is no file"):
            read_text(path)
    file.write_bytes(b"ab\xff")
    with pytest.raises(DataError, match="not UTF-8 text .byte 2"):
        read_text(str(file))
