"""Every fault in the files of a dataset is found by `verify`, which names a file that was touched; nothing that opens
or reads a damaged dataset fails with anything but a sentence."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from blues.data.merging.merge import merge, open_dataset
from blues.data.reports.verify import verify
from blues.data.storage import chunks, store
from blues.data.storage.store import SPLITS, Store
from blues.data.storage.versions import drop_documents
from blues.errors import BluesError, DataError
from tests.data.datasets import make_store
from tests.data.faults import Damage, Fault

KINDS = tuple(Damage(Path("nowhere")).kinds)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Path:
    """A dataset of two versions, one of compressed chunks, and the mixture of both."""
    root = tmp_path_factory.mktemp("faults")
    train = [["one two", "three"], ["four five six", "three", "seven"], ["eight nine ten"]]
    versioned = make_store(root / "versioned", train=train, validation=[["eleven", "twelve"]])
    drop_documents(Store.open(versioned), {"train": [1, 3]}, {"kind": "dedup"}, {"removed.parquet": b"rows"})
    packed = [["a b c", "d e"], ["f g h i"]]
    make_store(root / "packed", train=packed, validation=[["j k l"]], compression="zstd")
    merge([versioned, root / "packed"], root / "mix", weights=[0.75, 0.25])
    assert verify(root / "mix").good and verify(root / "mix").warnings == ()
    return root


def forget() -> None:
    """Close what this process keeps of chunks, as another process would not have them."""
    chunks.open_reader.cache_clear()
    chunks.memory_map.cache_clear()
    chunks.frames.clear()
    store.indexes.clear()


def named(fault: Fault, root: Path) -> bool:
    """Whether `verify` finds the fault and names a file that was touched."""
    touched = {path.resolve() for path in fault.touched}
    try:
        report = verify(root / "mix", sample=1000, num_workers=1)
    except DataError as error:  # no dataset at all is left
        return any(str(path.parent) in str(error) for path in fault.touched)
    return any(Path(issue.where).resolve() in touched for issue in report.issues)


def open_and_read(root: Path) -> None:
    """What training and looking do: it works, or it says why not."""
    forget()
    try:
        for opened in open_dataset(root / "mix").stores:
            for split in SPLITS:
                if opened.num_tokens(split):
                    opened.read_windows(split, np.array([0]), opened.num_tokens(split))
                    list(opened.tables(split)), opened.document(split, 0)
    except BluesError:
        pass


def inject(root: Path, numbers: Iterable[int]) -> list[str]:
    """Faults of these numbers, each of its own seed; returns those that are not found or not named."""
    missed, damage = [], Damage(root)
    for number in numbers:
        damage.generator = np.random.default_rng(number)
        with damage.fault(KINDS[number % len(KINDS)]) as fault:
            if not named(fault, root):
                missed.append(f"{number}: {fault.what}")
            if number % 4 == 0:
                open_and_read(root)
    return missed


def test_every_fault_is_found_and_named(datasets):
    assert inject(datasets, range(25 * len(KINDS))) == []
    assert verify(datasets / "mix").good, "all was put back"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_ten_thousand_faults_are_found_and_named(datasets, part):
    first = 1000 + 1000 * part
    assert inject(datasets, range(first, first + 1000)) == []
