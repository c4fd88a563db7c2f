"""The repository has the history that the figures speak of, and the same one for the same corpus."""

from __future__ import annotations

import json
import subprocess

import pytest

from tuning.benchmarks.data.corpus import Corpus, collect
from tuning.benchmarks.data.repository import build


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    root = tmp_path_factory.mktemp("source")
    for number in range(60):
        (root / f"{number}.py").write_text("".join(f"a_{number}_{line} = {line}\n" for line in range(20)))
    (root / ".gitignore").write_text("1.py\n")
    return collect(root.with_name("corpus"), [root])


def changes(repository) -> list[str]:
    words = ["git", "-C", repository.path, "diff", "--name-status", "-M", repository.before, repository.after]
    return [line.split()[0][0] for line in subprocess.check_output(words, text=True).splitlines()]


def test_commit_b_edits_removes_and_renames_as_many_as_it_says(corpus, tmp_path):
    made = build(tmp_path / "repository", corpus, share=0.1, moved=3)
    assert (made.files, made.edited, made.removed, made.renamed) == (60, 6, 3, 3)
    found = changes(made)
    assert {kind: found.count(kind) for kind in "MDR"} == {"M": 6, "D": 3, "R": 3} and len(found) == 12


def test_what_was_fetched_is_packed_and_what_was_committed_since_is_loose(corpus, tmp_path):
    made = build(tmp_path / "repository", corpus, share=0.1, moved=3)

    def git(*words: str) -> list[str]:
        return subprocess.check_output(["git", "-C", made.path, *words], text=True).split()

    [pack] = (tmp_path / "repository/.git/objects/pack").glob("*.idx")
    lines = subprocess.check_output(["git", "verify-pack", "-v", str(pack)], text=True).splitlines()
    packed = {line.split()[0] for line in lines if len(line.split()) >= 5 and len(line.split()[0]) == 40}
    loose = {path.parent.name + path.name for path in (tmp_path / "repository/.git/objects").glob("??/*")}
    reached = {commit: {line[:40] for line in git("rev-list", "--objects", "--no-object-names", commit)}
               for commit in (made.before, made.after)}  # fmt: skip
    assert packed == reached[made.before]
    assert loose == reached[made.after] - reached[made.before]
    assert len(loose) > made.edited and made.after in loose


def test_a_repository_whose_objects_lie_otherwise_is_made_anew(corpus, tmp_path):
    made = build(tmp_path / "repository", corpus, share=0.1, moved=3)
    note = tmp_path / "repository.made.json"
    tree = json.loads(note.read_text())
    tree["request"]["objects"] = "all loose"
    note.write_text(json.dumps(tree))
    (tmp_path / "repository/mark").touch()
    lines: list[str] = []
    assert build(tmp_path / "repository", corpus, share=0.1, moved=3, say=lines.append) == made
    assert not (tmp_path / "repository/mark").exists()
    assert lines == ["  repository: made anew, what was kept has another objects"]


def test_commits_depend_on_corpus_and_seed_alone(corpus, tmp_path):
    one, other = (build(tmp_path / name, corpus, share=0.1, moved=3) for name in ("one", "other"))
    assert (one.before, one.after) == (other.before, other.after)
    assert build(tmp_path / "one", corpus, share=0.1, moved=3) == one  # used again
    assert build(tmp_path / "one", corpus, share=0.1, moved=3, seed=1).after != one.after


def test_one_file_of_a_tiny_corpus_stays(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "only.py").write_text("a = 1\n")
    made = build(tmp_path / "repository", collect(tmp_path / "corpus", [tmp_path / "source"]), share=1.0)
    assert (made.edited, made.removed, made.renamed) == (1, 0, 0)
