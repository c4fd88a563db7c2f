"""What is said about removed documents: every row of the table, the counts, the page."""

from __future__ import annotations

import re

import numpy as np
import pytest

from blues.data.dedup.corpus import Corpus
from blues.data.dedup.dedup import Removal, find_duplicates
from blues.data.dedup.dedup_report import REMOVED_SCHEMA, Summary, _histogram, examples, page, removed_table
from blues.data.dedup.minhash import Settings
from blues.data.dedup.sketches import Sketches
from blues.data.storage.store import Store
from tests.data.datasets import make_store

SONG = "the quick brown fox jumps over the lazy dog and the dog <b>sleeps</b> & dreams of quick brown foxes "
NEAR = SONG + "again"


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> list[Store]:
    folder = tmp_path_factory.mktemp("stores")
    made = [
        make_store(folder / "code", train=[["one", SONG], ["two", "one"]], validation=[["held out"]]),
        make_store(folder / "text", train=[[NEAR], ["held out", "two"]], validation=[["three"]]),
    ]
    return [Store.open(path) for path in made]


@pytest.fixture(scope="module")
def summary(stores) -> Summary:
    corpus, wanted = Corpus.of(stores), Settings()
    with Sketches.room_for(len(corpus), wanted) as equal:  # every pair is a candidate
        removal = find_duplicates(corpus, wanted, equal)
    names = ("code", "text")
    return Summary.of(stores, names, removed_table(corpus, stores, names, removal))


def test_every_removed_document_has_a_row_that_says_why(summary):
    assert summary.removed.schema.equals(REMOVED_SCHEMA)
    rows = {(row["dataset"], row["document"]): row for row in summary.removed.to_pylist()}
    assert list(rows) == [("code", 3), ("text", 0), ("text", 1), ("text", 2)]
    equal = rows["code", 3]
    assert (equal["kind"], equal["similarity"], equal["split"], equal["id"]) == ("exact", 1.0, "train", "train-1-1")
    assert (equal["kept_dataset"], equal["kept_split"], equal["kept_document"]) == ("code", "train", 0)
    assert (equal["kept_id"], equal["text_bytes"]) == ("train-0-0", 3)
    near = rows["text", 0]
    assert near["kind"] == "near" and 0.7 <= near["similarity"] < 1
    assert (near["source"], near["kept_source"], near["kept_id"]) == ("text.txt", "code.txt", "train-0-1")
    assert rows["text", 1]["kept_split"] == "validation" and rows["text", 2]["kept_id"] == "train-1-0"


def test_the_counts_add_up(summary, stores):
    lines = {(line.dataset, line.split): line for line in summary.lines}
    assert len(lines) == 4
    train = lines["text", "train"]
    assert (train.documents, train.exact, train.near) == (3, 2, 1)
    assert train.tokens == stores[1].num_tokens("train") == train.removed_tokens
    assert (lines["code", "train"].exact, lines["code", "validation"].exact) == (1, 0)
    assert summary.matrix() == [[1, 0], [3, 0]] and summary.leaked == 1


def test_the_text_is_for_a_person(summary):
    text = summary.text()
    rows = [line.split() for line in text.splitlines()]
    assert ["all", "9", "3", "1"] in [row[:4] for row in rows]
    assert ["text", "3", "0"] in rows and ["code", "1", "0"] in rows
    assert "1 training documents repeat a validation document, which stays; training loses them" in text
    assert "no train document of text is left; leave it out of a merge" in text
    assert "text train train-0-0  repeats  code train train-0-1" in text


def test_the_page_shows_what_differs_and_escapes_the_documents(summary, stores):
    text = page(summary, stores, "Duplicates of <these>")
    assert "Duplicates of &lt;these&gt;" in text and "<b>sleeps" not in text
    assert "<ins>+the quick" in text and "&lt;b&gt;sleeps&lt;/b&gt; &amp; dreams" in text
    assert text.count("<table>") == 3 and text.endswith("</html>\n")


def test_nothing_removed_is_a_summary_too(stores):
    corpus = Corpus.of(stores[:1])
    nothing = np.empty(0, dtype=np.int64)
    removal = Removal(nothing, nothing, nothing.astype(bool), nothing.astype(float))
    summary = Summary.of(stores[:1], ["code"], removed_table(corpus, stores, ["code"], removal))
    assert summary.removed.num_rows == 0 and summary.matrix() == [[0]] and summary.notes() == []
    assert "0 (0.0%)" in summary.text() and "<h1>" in page(summary, stores[:1], "Duplicates")


def test_examples_span_the_similarities(summary):
    assert [row["kind"] for row in examples(summary.removed, 3)] == ["near"]
    exact = summary.removed.filter(summary.removed["similarity"].to_numpy() == 1.0)
    assert len(examples(exact, 2)) == 2


@pytest.mark.parametrize("similarity", [[0.951, 0.953], [1.0], [0.7, 1.0]])
def test_no_two_bars_of_the_similarities_have_one_label(similarity):
    text = _histogram(np.array(similarity))
    labels = re.findall(r"<td>([\d.]+) to ([\d.]+)</td>", text)
    assert len(set(labels)) == len(labels) == 10 and all(low < high for low, high in labels)
    assert sum(map(int, re.findall(r"</td><td>(\d+)</td>", text))) == len(similarity)
