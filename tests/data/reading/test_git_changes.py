"""A plan from what changed between two commits is the plan of a whole listing, whatever changed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as hyp

from blues.data.reading import git_changes, locate, sources
from blues.data.reading.git_changes import Known
from blues.data.reading.sources import Plan
from tests.data.reading.test_git import commit, own_settings, run_git  # noqa: F401  (a fixture)

NAMES = [
    *("a.py", "b.go", "Z.PY", "note.md", "t.csv", "t.jsonl", "t.jsonl.gz", "photo.png", "x.tar.gz", ".hidden"),
    *("Makefile", "é ü.py", "q'\n.txt", "py", "end."),
]
FOLDERS = ["", "pkg/", "pkg.py/", "pkg/deep er/", ".github/", "node_modules/", "pkg-x/"]
CONTENTS = [b"", b"a = 1\n", b"text\nrow\n", b'{"text": "row"}\n', b"\0\1", b"title\nrow\n"]
LINK = "a link"


def known_of(plan: Plan) -> Callable[[], Known]:
    return lambda: Known(plan.source["tree"], plan.ignored, lambda: plan.files)


def told(plan: Plan) -> tuple:
    """All there is to a plan."""
    readings = sorted(plan.readings)
    return (
        plan.files.to_pydict(),
        plan.ignored,
        plan.content,
        plan.source,
        readings,
        plan.rejected,
        plan.listing.entries(),
    )


def write(folder: Path, path: str, content: bytes | str) -> None:
    file = folder / path
    for place in (file, *file.parents):  # what was a file may become a folder, and the other way round
        if place == folder:
            break
        if place.is_symlink() or (place.is_file() and place != file):
            place.unlink()
    if file.is_dir():
        shutil.rmtree(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    if content is LINK:
        file.unlink(missing_ok=True)
        file.symlink_to("nowhere")
    else:
        file.write_bytes(content)


PATHS = hyp.builds(str.__add__, hyp.sampled_from(FOLDERS), hyp.sampled_from(NAMES))
CHANGES = hyp.dictionaries(PATHS, hyp.sampled_from([None, LINK, *CONTENTS]), max_size=12)


@settings(max_examples=10, deadline=None)
@given(commits=hyp.lists(CHANGES, min_size=2, max_size=4), below=hyp.sampled_from(["", "pkg"]))
def test_random_commits_are_planned_alike(tmp_path_factory, commits, below):
    folder = tmp_path_factory.mktemp("repository")
    run_git(folder, "init", "--quiet", "--initial-branch=main")
    write(folder, "pkg/first.py", b"first = 1\n")
    plans = []
    for changes in commits:
        for path, content in changes.items():
            if content is not None:
                write(folder, path, content)
            elif (folder / path).is_symlink() or (folder / path).is_file():
                (folder / path).unlink()
        (folder / "pkg").mkdir(exist_ok=True)
        write(folder, "pkg/last.py", f"{random.random()}\n".encode())
        id = commit(folder)
        plans.append(sources.plan(folder / below, commit=id))
    for before in plans:
        for after in plans:
            found = sources.plan(folder / below, commit=after.source["commit"], known=known_of(before))
            assert told(found) == told(after)


@pytest.fixture
def repository(tmp_path) -> Path:
    folder = tmp_path / "project"
    (folder / "project").mkdir(parents=True)
    run_git(folder, "init", "--quiet", "--initial-branch=main")
    for name in ("a.py", "b.xyz", "project/c.py", "project/d.txt", "t.csv"):
        (folder / name).write_text("text,title\nrow,name\n")
    commit(folder)
    return folder


@pytest.fixture
def listed(monkeypatch) -> list[bool]:
    """For each plan whether it came of what changed."""
    found = []
    entries_since = git_changes.entries_since

    def watched(*arguments):
        listing = entries_since(*arguments)
        found.append(listing is not None)
        return listing

    monkeypatch.setattr(locate, "entries_since", watched)
    return found


def changed(folder: Path) -> str:
    with open(folder / "a.py", "a") as file:
        file.write("changed = 1\n")
    (folder / "project" / "new.py").write_text("new = 1\n")
    return commit(folder)


def test_only_changes_are_looked_at(repository, listed, monkeypatch):
    before = sources.plan(repository, commit="main")
    id = changed(repository)
    after = sources.plan(repository, commit=id)
    with monkeypatch.context() as patch:
        patch.setattr(git_changes.GitFiles, "entries", None)  # nothing lists everything
        assert told(sources.plan(repository, commit=id, known=known_of(before))) == told(after)
    assert listed == [False, False, True]


@pytest.mark.parametrize(
    "options", [{"kind": "text"}, {"text_column": "title"}, {"encoding": "latin-1"}, {"max_document_bytes": 5}]
)
def test_other_options_than_the_dataset_was_made_with_make_no_difference(repository, options):
    for first, second in ((options, {}), ({}, options), (options, options)):
        before = sources.plan(repository, commit="main", **first)
        id = changed(repository)
        found = sources.plan(repository, commit=id, known=known_of(before), **second)
        assert told(found) == told(sources.plan(repository, commit=id, **second))


def test_a_dataset_of_another_folder_or_a_lost_commit_is_no_help_and_no_harm(repository, listed):
    """A folder of the repository with the same name, a tree that git has thrown away, and counts that were added up."""
    of_folder = sources.plan(repository / "project", commit="main")
    plan = sources.plan(repository, commit="main")
    id = changed(repository)
    after = sources.plan(repository, commit=id)
    assert of_folder.name == plan.name
    assert told(sources.plan(repository, commit=id, known=known_of(of_folder))) == told(after)
    for known in (
        Known("0" * 39 + "1", plan.ignored, lambda: plan.files),
        Known(f"--output={repository}/made", plan.ignored, lambda: plan.files),
        Known(plan.source["tree"], {"other kinds": 1}, lambda: plan.files),
        Known(plan.source["tree"], {".py": 1}, lambda: plan.files),
        Known(plan.source["tree"], plan.ignored, lambda: of_folder.files),
    ):
        listed.clear()
        assert told(sources.plan(repository, commit=id, known=lambda known=known: known)) == told(after)
        assert listed == [False] and not (repository / "made").exists()


def test_a_file_that_was_named_alone_does_not_stand_for_its_folder(repository):
    assert "tree" not in sources.plan(repository / "t.csv", commit="main").source


def test_names_that_are_not_utf8_are_listed_whole(repository, listed):
    before = sources.plan(repository, commit="main")
    Path(repository, "caf\udce9.py").write_text("f = 1\n")
    id = commit(repository)
    listed.clear()
    found = sources.plan(repository, commit=id, known=known_of(before))
    assert listed == [False] and told(found) == told(sources.plan(repository, commit=id))
    (repository / "caf\udce9.py").unlink()
    id = commit(repository)
    after = sources.plan(repository, commit=id)
    assert told(sources.plan(repository, commit=id, known=known_of(found))) == told(after)
