"""A repository is updated from what changed between two commits, and the dataset is read beside it."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import pytest

from blues.cluster.prepare import prepare
from blues.data.reading import sources
from blues.data.reading.git import GitFiles
from blues.data.storage.store import Store
from blues.errors import DataError
from tests.cluster.test_update import assert_same, commit, git, raw, small_parts, write  # noqa: F401  (two fixtures)
from tests.data.datasets import TOKENIZER


@pytest.fixture
def repository(raw) -> Path:  # noqa: F811  (a fixture)
    """The files of `raw` in a repository, committed."""
    git(raw, "init", "--quiet")
    (raw / "photo.png").write_bytes(b"png")
    commit(raw)
    return raw


def looking(folder: Path):
    """What `blues prepare` gives: a function that plans the newest commit."""
    return functools.partial(sources.plan, folder, commit="HEAD")


def test_a_repository_is_updated_from_what_changed_between_two_commits(repository, tmp_path, monkeypatch):
    prepare(looking(repository), tmp_path / "data", TOKENIZER)
    generator = random.Random(2)
    for step in range(2):
        for file in generator.sample(sorted(repository.glob("*.*")), 3):
            if generator.random() < 0.3:
                file.unlink()
            elif file.suffix == ".py":
                write(file, generator)
            else:
                file.rename(repository / f"renamed{step}-{generator.randrange(999)}{file.suffix}")
            write(repository / f"added{step}-{generator.randrange(999)}.py", generator)
        commit(repository)
        with monkeypatch.context() as patch:
            patch.setattr(GitFiles, "entries", None)  # nobody lists everything
            updated = prepare(looking(repository), tmp_path / "data", TOKENIZER, mode="update")
            assert not prepare(looking(repository), tmp_path / "data", TOKENIZER, mode="update").made
        assert updated.made and updated.store.version == step + 2
        assert_same(updated.store, prepare(looking(repository), tmp_path / f"fresh{step}", TOKENIZER).store)


def test_what_another_process_wrote_while_the_source_was_looked_through_counts(repository, tmp_path):
    prepare(looking(repository), tmp_path / "data", TOKENIZER)
    write(repository / "added1.py", random.Random(1))
    commit(repository)

    def look(**options):
        plan = looking(repository)(**options)
        write(repository / "added2.py", random.Random(2))
        commit(repository)
        prepare(looking(repository), tmp_path / "data", TOKENIZER, mode="update")
        return plan

    updated = prepare(look, tmp_path / "data", TOKENIZER, mode="update").store
    assert updated.version == 3 and updated.manifest["operation"]["files_removed"] == 1
    assert updated.manifest["parent"] == Store.open(f"{tmp_path / 'data'}@2").checksum and updated.check() == []


def test_damage_is_told_as_ever_and_after_what_is_wrong_with_the_source(repository, tmp_path):
    store = prepare(looking(repository), tmp_path / "data", TOKENIZER).store
    (tmp_path / "data" / next(store.files()).file).unlink()
    with pytest.raises(DataError, match="no commit 'nothing'"):
        prepare(
            functools.partial(sources.plan, repository, commit="nothing"), tmp_path / "data", TOKENIZER, mode="update"
        )
    with pytest.raises(DataError, match="is damaged: chunks/train-.*restore the file"):
        prepare(looking(repository), tmp_path / "data", TOKENIZER, mode="update")
