"""A look into a dataset shows what is there: overviews from the indexes, documents that fit, windows as in training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from blues.data.merging.merge import merge, open_dataset
from blues.data.mixture.batches import Mixture
from blues.data.mixture.packing import IGNORED, BestFit, Stream
from blues.data.reports import inspection
from blues.data.reports.inspection import choose_documents, overview, training_window
from blues.data.storage import store
from blues.data.storage.chunks import CHUNKS
from blues.data.storage.store import SPLITS, Store
from blues.data.storage.versions import drop_documents
from blues.errors import BluesError, ConfigError, DataError
from tests.data.datasets import TOKENIZER, make_store

TRAIN = [["one two", "three"], ["four five six", "three", "seven"], ["eight nine ten " * 9]]


@pytest.fixture(scope="module")
def mix(tmp_path_factory) -> Path:
    """A dataset of two versions and a compressed one, merged."""
    root = tmp_path_factory.mktemp("inspection")
    first = make_store(root / "first", train=TRAIN, validation=[["eleven", "twelve"]])
    drop_documents(Store.open(first), {"train": [1, 3]}, {"kind": "dedup"})
    second = make_store(root / "second", train=[["a b c"] * 5], validation=[["d e f g h i"]], compression="zstd")
    merge([first, second], root / "mix", weights=[0.75, 0.25])
    return root / "mix"


def test_the_overview_is_that_of_the_stores(mix):
    found, dataset = overview(mix), open_dataset(mix)
    assert (found.strategy, found.fingerprint) == ("weighted", dataset.fingerprint)
    for source, own, weight in zip(found.sources, dataset.stores, dataset.weights, strict=True):
        assert (source.version, source.weight) == (own.version, float(weight))
        for split in source.splits:
            lengths = np.diff(own.document_ends(split.split), prepend=0)
            assert (split.documents, split.tokens) == (len(lengths), own.num_tokens(split.split))
            assert split.text_bytes == own.text_bytes(split.split)
            assert sum(split.lengths.bins) == len(lengths) and split.lengths.longest == lengths.max()
    first, second = found.sources
    assert first.versions == (1, 2) and second.versions == (1,) and first.operation == {"kind": "dedup"}
    assert first.splits[0].compression == ("none",) and second.splits[0].compression == ("zstd",)
    on_disk = sum(file.stat().st_size for file in (mix.parent / "second" / CHUNKS).iterdir())
    assert sum(split.bytes for split in second.splits) == on_disk


def test_the_overview_of_a_version_is_of_that_version(mix):
    [source] = overview(f"{mix.parent / 'first'}@1").sources
    assert (source.version, source.splits[0].documents) == (1, 6)


def test_no_token_is_read_for_an_overview(tmp_path):
    path = make_store(tmp_path / "data", train=TRAIN)
    for file in (path / CHUNKS).glob("*.tokens"):
        file.write_bytes(bytes(file.stat().st_size))
    assert overview(path).sources[0].splits[0].documents == 6


def test_documents_are_drawn_by_seed_without_repeats_in_order(mix):
    everything = choose_documents(mix, 1000)
    assert len(everything) == 4 + 2 + 5 + 1
    for look in everything:
        own = open_dataset(mix).stores[["first", "second"].index(look.dataset)]
        assert np.array_equal(look.document.tokens, own.document(look.split, look.number).tokens)
    keys = [(look.dataset, look.split, look.number) for look in everything]
    some = [(look.dataset, look.split, look.number) for look in choose_documents(mix, 5, seed=1)]
    assert len(set(some)) == 5 and some == sorted(some, key=keys.index)
    assert some == [(look.dataset, look.split, look.number) for look in choose_documents(mix, 5, seed=1)]
    draws = [[look.number for look in choose_documents(mix, 3, seed=seed)] for seed in range(20)]
    assert len(set(map(tuple, draws))) > 5


def test_documents_can_be_chosen_by_split_file_and_id(mix):
    assert {look.split for look in choose_documents(mix, 99, splits=("validation",))} == {"validation"}
    assert {look.dataset for look in choose_documents(mix, 99, source="sec*.txt")} == {"second"}
    [look] = choose_documents(mix, 99, id="validation-0-1")
    assert (look.dataset, look.document.id) == ("first", "validation-0-1")
    with pytest.raises(DataError, match=r"holds no document with the id 'x' of a file like '\*\.py' in train or valid"):
        choose_documents(mix, 1, id="x", source="*.py")
    with pytest.raises(ConfigError, match="must be at least 1, got 0"):
        choose_documents(mix, 0)


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
@pytest.mark.parametrize("split", SPLITS)
def test_a_window_is_what_training_reads(mix, packing, split):
    length = 5
    kind = {"stream": Stream, "best_fit": BestFit}[packing].Config()
    config = Mixture.Config(path=str(mix), sequence_length=length, seed=3, tokenizer=TOKENIZER, packing=kind)
    mixture, eot = config.build(split=split), TOKENIZER.build().eot_id
    for index in range(30):
        batch = mixture.batch([index])
        found = training_window(mix, index, length, split=split, seed=3, packing=packing)
        targets = batch.targets[0].numpy()
        assert np.concatenate([piece.tokens for piece in found.pieces]).tolist() == targets[targets != IGNORED].tolist()
        assert found.padding == (targets == IGNORED).sum() and found.first_input == batch.inputs[0, 0]
        own = mixture.dataset.stores[mixture.source_names.index(found.dataset)]
        for piece in found.pieces:
            document = own.document(split, piece.number)
            assert (piece.id, piece.source, piece.length) == (document.id, document.source, len(document.tokens))
            assert np.array_equal(piece.tokens, document.tokens[piece.start : piece.stop])
            assert (piece.tokens[-1] == eot) == (piece.stop == piece.length)


def test_a_window_that_is_none_is_a_sentence(mix):
    with pytest.raises(ConfigError, match=r"samples \(--window\) count from 0, got -1"):
        training_window(mix, -1, 5)
    with pytest.raises(ConfigError, match="unknown packing 'streem'. Did you mean 'stream'"):
        training_window(mix, 0, 5, packing="streem")
    with pytest.raises(DataError, match="too few for one sequence"):
        training_window(mix, 0, 100_000)


def test_everything_is_json(mix):
    tree = json.loads(inspection.to_json(overview(mix)))
    assert [source["name"] for source in tree["sources"]] == ["first", "second"]
    tree = json.loads(inspection.to_json(training_window(mix, 0, 5)))
    assert sum(len(piece["tokens"]) for piece in tree["pieces"]) == 5
    tokenizer = inspection.tokenizer_of(mix)
    looks = choose_documents(mix, 2)
    trees = json.loads(inspection.to_json([inspection.with_text(look, tokenizer) for look in looks]))
    for look, tree in zip(looks, trees, strict=True):
        assert tokenizer.encode(tree["text"]) == tree["tokens"][:-1] == look.document.tokens[:-1].tolist()


def test_damaged_indexes_are_a_sentence(tmp_path):
    path = make_store(tmp_path / "data", train=TRAIN)
    for file in (path / CHUNKS).glob("*.parquet"):
        file.write_bytes(bytes(file.stat().st_size))
    store.indexes.clear()  # another process would not have read it before
    for look in (lambda: overview(path), lambda: choose_documents(path, 1), lambda: training_window(path, 0, 3)):
        with pytest.raises(BluesError, match="does not match its checksum in the manifest; restore it"):
            look()
