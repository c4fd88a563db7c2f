"""The language of every token against a walk over its documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blues.data.merging.merge import merge
from blues.data.mixture.batches import Mixture
from blues.data.mixture.packing import IGNORED
from blues.data.storage.chunks import ChunkWriter
from blues.errors import DataError
from tests.data.datasets import TOKENIZER, publish

LANGUAGES = ("python", None, "c", "python", 3)
"""Of the documents of each store in turn; a language is a text."""
NAMES = ("unknown", "c", "python", "rust")


def make_store(directory: Path, languages: tuple[object, ...], split_at: int) -> Path:
    """Documents of different lengths, all of whose tokens are the document's number."""
    directory.mkdir(parents=True)
    eot = TOKENIZER.build().eot_id
    writers = {split: ChunkWriter(directory, split, 0) for split in ("train", "validation")}
    for number, language in enumerate(languages * 6):
        tokens = np.array([number] * (3 + 5 * number % 17) + [eot], dtype=np.uint32)
        metadata = {"place": number} | ({} if language is None else {"language": language})
        split = "train" if number < split_at else "validation"
        writers[split].add(tokens, id=str(number), source="s", text_bytes=number, metadata=metadata)
    return publish(directory, [writer.close() for writer in writers.values()])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("languages")
    stores = [make_store(folder / "first", LANGUAGES, 24), make_store(folder / "second", ("rust", "c"), 8)]
    merge(stores, folder / "both", weights=[0.5, 0.5])
    return folder / "both"


def config(path: Path, **rest) -> Mixture.Config:
    return Mixture.Config(path=str(path), sequence_length=16, tokenizer=TOKENIZER, languages=True).override(rest)


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_input_has_the_language_of_its_document(data, packing, split):
    """A target tells its document by its own number; of an end of text that is the input before."""
    mixture = config(data, packing=packing).build(split=split)
    assert mixture.language_names == NAMES
    eot, known = TOKENIZER.build().eot_id, 0
    batch = mixture.batch(range(12))
    assert batch.languages is not None and batch.languages.dtype == batch.inputs.dtype
    for row, source in enumerate(batch.sources.tolist()):
        own = LANGUAGES if source == 0 else ("rust", "c")
        columns = zip(
            batch.inputs[row].tolist(), batch.targets[row].tolist(), batch.languages[row].tolist(), strict=True
        )
        for before, target, language in columns:
            if target == IGNORED:
                assert language == 0
                continue
            document = before if target == eot else target
            name = own[document % len(own)] if document != eot else None
            assert NAMES[language] == (name if isinstance(name, str) else "unknown")
            known += language > 0
    assert known > 50


def test_languages_do_not_change_what_is_read_and_come_when_asked(data):
    with_languages, plain = config(data).build(), config(data, languages=False).build()
    ours, theirs = with_languages.batch([3, 1, 4]), plain.batch([3, 1, 4])
    assert theirs.languages is None and plain.language_names == ()
    assert bool((ours.inputs == theirs.inputs).all()) and bool((ours.sources == theirs.sources).all())
    assert with_languages.fingerprint == plain.fingerprint
    moved = ours.to(ours.inputs.device)
    assert moved.languages is not None and bool((moved.languages == ours.languages).all())


def test_a_dataset_without_languages_is_refused(tmp_path):
    store = make_store(tmp_path / "store", (None,), 4)
    with pytest.raises(DataError, match="no document of .* has the metadata 'language'"):
        config(store).build()
