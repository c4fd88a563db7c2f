"""A task of preparing writes the same files whoever does it, holds out documents by their ids, and counts every row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as hyp

from blues.data.preparing import shards
from blues.data.preparing.shards import HASH_RANGE, Recipe, Split, TaskResult, place_of, rejected_file, run_task
from blues.data.reading import sources
from blues.data.reading.readers import Document, Rejected, read_part
from blues.data.storage import store as st
from blues.data.storage.chunks import CHUNKS
from blues.errors import DataError
from tests.data.datasets import TOKENIZER, publish, snapshot

HALF = Split.fraction(0.5)


@pytest.fixture
def plan(tmp_path, monkeypatch) -> sources.Plan:
    """A few hundred rows in several tasks, some of them unusable."""
    monkeypatch.setattr(sources, "PART_BYTES", 1500)
    folder = tmp_path / "raw"
    folder.mkdir()
    rows = [f'{{"id": "r{number}", "text": "row {number} é {"x" * (number % 7)}"}}' for number in range(150)]
    rows[10], rows[77], rows[78] = "{", '{"id": "a", "text": ""}', '{"id": "b", "text": null}'
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "note.md").write_text("# A note\n")
    return sources.plan(folder, id_column=None)


def work(
    plan: sources.Plan, directory: Path, split: Split = HALF, numbers: list[int] | None = None
) -> list[TaskResult]:
    tasks = plan.tasks()
    numbers = list(range(len(tasks))) if numbers is None else numbers
    return [
        run_task(directory, number, plan.root, tasks[number], TOKENIZER.build(), Recipe(HALF)) for number in numbers
    ]


def stored(directory: Path, results: list[TaskResult]) -> list[tuple[str, st.StoredDocument]]:
    """(split, document) of all chunks, read as a dataset."""
    chunks = [chunk for result in results for chunk in result.chunks]
    store = st.Store.open(publish(directory, chunks))
    assert store.check() == []
    return [(split, document) for split in st.SPLITS for document in store.documents(split)]


def test_every_row_becomes_a_document_of_its_split_or_a_rejected_line(plan, tmp_path):
    records = [record for part in plan.parts() for record in read_part(plan.root, part)]
    documents = [record for record in records if isinstance(record, Document)]
    rejected = [record for record in records if isinstance(record, Rejected)]
    results = work(plan, tmp_path / "out")
    assert len(results) > 3 and len(documents) == 148
    assert sum(result.documents for result in results) == len(documents)
    assert sum(sum(result.rejected.values()) for result in results) == len(rejected) == 3

    tokenizer, found = TOKENIZER.build(), stored(tmp_path / "out", results)
    assert {d.id: (d.source, tokenizer.decode(d.tokens[:-1])) for _, d in found} == {
        d.id: (d.source, d.text) for d in documents
    }
    assert all(split == HALF.of(place_of(document.id)) for split, document in found)
    assert all(document.text_bytes == len(tokenizer.decode_bytes(document.tokens[:-1])) for _, document in found)
    assert {document.metadata.get("language") for _, document in found} == {None, "markdown"}

    lines = [
        json.loads(line)
        for number in range(len(results))
        for line in rejected_file(tmp_path / "out", number).read_bytes().splitlines()
    ]
    assert [(line["file"], line["row"], line["reason"]) for line in lines] == [
        ("rows.jsonl", 11, "invalid JSON"),
        ("rows.jsonl", 78, "empty"),
        ("rows.jsonl", 79, "no text"),
    ]
    assert lines[2]["detail"] == "column 'text' is null" and "detail" not in lines[1] and "rows" not in lines[0]


def test_tasks_give_the_same_files_in_any_order_and_again(plan, tmp_path):
    work(plan, tmp_path / "first")
    expected = snapshot(tmp_path / "first")
    work(plan, tmp_path / "second", numbers=list(reversed(range(len(plan.tasks())))))
    assert snapshot(tmp_path / "second") == expected
    work(plan, tmp_path / "first", numbers=[1, 0, 1])
    assert snapshot(tmp_path / "first") == expected


def test_a_result_is_read_back_and_a_task_without_all_its_files_is_not_done(plan, tmp_path):
    results = work(plan, tmp_path / "out")
    assert [TaskResult.read(tmp_path / "out", number) for number in range(len(results))] == results
    assert results[0].tokens == sum(chunk.tokens for chunk in results[0].chunks)
    assert TaskResult.read(tmp_path / "out", len(results)) is None
    chunk = results[0].chunks[0]
    for file in (
        tmp_path / "out" / chunk.data.file,
        tmp_path / "out" / chunk.index.file,
        rejected_file(tmp_path / "out", 0),
        shards.result_file(tmp_path / "out", 0),
    ):
        content = file.read_bytes()
        file.unlink()
        assert TaskResult.read(tmp_path / "out", 0) is None
        if content:
            file.write_bytes(content[:-9])
            assert TaskResult.read(tmp_path / "out", 0) is None
        file.write_bytes(content)
        assert TaskResult.read(tmp_path / "out", 0) == results[0]


def test_lowest_and_highest_places_bound_the_documents_of_a_task(plan, tmp_path):
    for number, result in enumerate(work(plan, tmp_path / "out")):
        records = [record for part in plan.tasks()[number] for record in read_part(plan.root, part)]
        places = [place_of(record.id) for record in records if isinstance(record, Document)]
        assert (result.lowest, result.highest) == (min(places), max(places))


def test_a_task_without_a_usable_row_writes_no_chunk(tmp_path):
    (tmp_path / "raw.csv").write_text("text\n \n")
    [result] = work(sources.plan(tmp_path / "raw.csv"), tmp_path / "out")
    assert result == TaskResult((), {"empty": 1}, None, None)
    assert TaskResult.read(tmp_path / "out", 0) == result
    assert not (tmp_path / "out" / CHUNKS).exists()


def test_a_task_that_fails_leaves_no_chunk_and_no_result(plan, tmp_path, monkeypatch):
    def fails_after_five(root, part):
        for number, record in enumerate(read_part(root, part)):
            if number == 5:
                raise DataError("'rows.jsonl' changed while it was being prepared")
            yield record

    with monkeypatch.context() as patch:
        patch.setattr(shards, "read_part", fails_after_five)
        with pytest.raises(DataError, match="changed while"):
            work(plan, tmp_path / "out", numbers=[1])
    assert not list((tmp_path / "out").rglob("*.tokens*"))
    assert list((tmp_path / "out" / shards.TASKS).iterdir()) == []
    expected = work(plan, tmp_path / "whole", numbers=[1])
    assert work(plan, tmp_path / "out", numbers=[1]) == expected
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_a_source_that_changed_since_it_was_planned_is_refused(plan, tmp_path):
    file = plan.root.folder / "rows.jsonl"
    file.write_text(file.read_text().replace("row 3", "row 9"))
    with pytest.raises(DataError, match=r"rows.jsonl' changed while it was being prepared; run the command again"):
        work(plan, tmp_path / "out", numbers=[1])


@given(ids=hyp.lists(hyp.text(hyp.characters(exclude_categories=["Cs"])), unique=True, max_size=20))
def test_the_split_of_an_id_grows_with_the_share(ids):
    for id in ids:
        assert 0 <= place_of(id) < HASH_RANGE
        splits = [Split.fraction(share).of(place_of(id)) for share in (0, 0.01, 0.3, 0.7, 1)]
        assert splits[0] == "train" and splits[-1] == "validation"
        assert splits == sorted(splits), "who is held out at a share is held out at every larger one"


def test_the_share_of_documents_is_the_share_that_was_asked_for():
    places = [place_of(f"notes.csv:{row}") for row in range(20_000)]
    for share in (0.01, 0.05, 0.5):
        held_out = sum(Split.fraction(share).of(place) == "validation" for place in places)
        assert abs(held_out - share * 20_000) < 5 * (20_000 * share * (1 - share)) ** 0.5


def test_the_place_of_an_id_is_the_same_in_every_release():
    places = [place_of(id) for id in ("", "a.py", "naïve:7")]
    assert places == [
        3244421341483603138,
        5430616262351688721,
        13215757812273001145,
    ]
