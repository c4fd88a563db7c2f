"""A commit is read as its files would be if they lay in a folder; nothing of a repository runs; errors are told."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blues.data.reading import git, sources
from blues.data.reading.readers import Document, Rejected, read_part
from blues.errors import DataError

IDENTITY = {
    **{f"GIT_{who}_NAME": "Someone" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_EMAIL": "someone@example.org" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_DATE": "2026-01-01T00:00:00Z" for who in ("AUTHOR", "COMMITTER")},
}


@pytest.fixture(autouse=True)
def own_settings(tmp_path_factory, monkeypatch):
    """No configuration of the person who runs the tests, and a cache of our own."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("BLUES_CACHE", str(home / "a cache"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


def run_git(folder: Path, *words: str | bytes) -> str:
    done = subprocess.run(["git", *words], cwd=folder, env=os.environ | IDENTITY, check=True, capture_output=True)
    return done.stdout.decode().strip()


def commit(folder: Path, message: str = "a change") -> str:
    run_git(folder, "add", "--all", "--force")
    run_git(folder, "commit", "--quiet", "--message", message)
    return run_git(folder, "rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "a repo, ünïcode"
    (folder / "pkg" / "deep er").mkdir(parents=True)
    (folder / ".github").mkdir()
    run_git(folder, "init", "--quiet", "--initial-branch=main")
    (folder / "a.py").write_text("a = 1\n")
    (folder / "pkg" / "b.go").write_text("package b\n")
    (folder / "pkg" / "deep er" / "new\nline, \t tab.py").write_text("c = 1\n")
    (folder / "pkg" / "ünïcode '\"$(x).py").write_text("d = 1\n")
    (folder / ".github" / "ci.yml").write_text("on: push\n")
    (folder / ".hidden.py").write_text("e = 1\n")
    (folder / "photo.png").write_bytes(b"png")
    (folder / "binary.py").write_bytes(b"\0\1")
    (folder / "empty.py").touch()
    os.symlink("a.py", folder / "link.py")
    os.symlink("..", folder / "pkg" / "loop")
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.py")).write_text("f = 1\n")
    write_tables(folder)
    commit(folder)
    return folder


def write_tables(folder: Path) -> None:
    rows = [{"text": f"row {number}\nof the table", "id": f"r{number}", "n": number} for number in range(300)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet", row_group_size=50)
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    (folder / "t.csv").write_text("text,id,n\n" + "".join(f'"{r["text"]}",{r["id"]},{r["n"]}\n' for r in rows) + "x\n")
    (folder / "long.txt").write_text("A paragraph of some words.\n\n" * 40_000)


def read_all(plan: sources.Plan) -> list[Document | Rejected]:
    place = pickle.loads(pickle.dumps(plan.root.absolute()))
    return [record for task in plan.tasks() for part in task for record in read_part(place, part)]


def texts(plan: sources.Plan) -> dict[str, str]:
    return {record.id: record.text for record in read_all(plan) if isinstance(record, Document)}


@pytest.mark.parametrize("part_bytes", [4 << 20, 3000])
@pytest.mark.parametrize("held_bytes", [8 << 20, 100])
def test_a_commit_reads_like_a_folder(repository, monkeypatch, part_bytes, held_bytes):
    monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
    monkeypatch.setattr(git, "HELD_BYTES", held_bytes)
    options = {"metadata_columns": ("n",), "id_column": "id"}
    folder, at_commit = sources.plan(repository, **options), sources.plan(repository, commit="main", **options)
    assert read_all(at_commit) == read_all(folder)
    assert at_commit.files.select(["file", "bytes"]) == folder.files.select(["file", "bytes"])
    assert at_commit.ignored == folder.ignored == {".png": 1, "hidden file": 1, "link or special file": 2}
    assert [len(task) for task in at_commit.tasks()] == [len(task) for task in folder.tasks()]
    names = set(at_commit.files["file"].to_pylist())
    assert {"pkg/deep er/new\nline, \t tab.py", "pkg/ünïcode '\"$(x).py", "caf\\xe9.py"} <= names


def test_the_working_tree_does_not_matter(repository):
    first = run_git(repository, "rev-parse", "HEAD")
    (repository / "a.py").write_text("a = 2\n")
    (repository / "untracked.py").write_text("u = 1\n")
    (repository / "pkg" / "b.go").unlink()
    found = texts(sources.plan(repository, commit="HEAD"))
    assert found["a.py"] == "a = 1\n" and "pkg/b.go" in found and "untracked.py" not in found
    second = commit(repository)
    assert texts(sources.plan(repository, commit=first)) == found
    assert texts(sources.plan(repository, commit=second))["a.py"] == "a = 2\n"
    assert texts(sources.plan(repository))["a.py"] == "a = 2\n", "without a commit it is a folder"


def test_a_source_names_repository_commit_and_ref_but_no_path(repository, tmp_path):
    id = run_git(repository, "rev-parse", "HEAD")
    run_git(repository, "tag", "-a", "v1.0", "-m", "a tag with a message")
    run_git(repository, "branch", "feature/x")
    for ref in ("v1.0", "feature/x", "refs/heads/main", "HEAD", id[:8]):
        source = sources.plan(repository, commit=ref).source
        assert (source["kind"], source["name"], source["commit"], source["ref"]) == ("git", repository.name, id, ref)
        assert str(tmp_path) not in json.dumps(source)
    by_id = sources.plan(repository, commit=id).source
    assert by_id["commit"] == id and "ref" not in by_id
    bare = tmp_path / "bare.git"
    run_git(tmp_path, "clone", "--quiet", "--bare", str(repository), str(bare))
    plans = [sources.plan(bare), sources.plan(repository / ".git"), sources.plan(f"git+file://{repository}")]
    assert [plan.name for plan in plans] == ["bare", repository.name, repository.name]
    assert {plan.content for plan in plans} == {by_id["content"]}
    assert read_all(plans[0]) == read_all(plans[1]) == read_all(plans[2])


def test_a_folder_of_a_repository_is_read_alone(repository):
    plan = sources.plan(repository / "pkg", commit="main")
    assert sorted(texts(plan)) == ["b.go", "deep er/new\nline, \t tab.py", "ünïcode '\"$(x).py"]
    one = sources.plan(repository / "t.csv", commit="main", id_column="id")
    assert one.files["file"].to_pylist() == ["t.csv"] and len(texts(one)) == 300


def test_equal_contents_have_equal_tokens_and_only_changes_differ(repository):
    before = sources.plan(repository, commit="HEAD")
    (repository / "a.py").write_text("a = 3\n")
    (repository / "pkg" / "b.go").rename(repository / "pkg" / "moved.go")
    commit(repository)
    after = sources.plan(repository, commit="HEAD")
    old, new = (
        dict(zip(plan.files["file"].to_pylist(), plan.files["content"].to_pylist(), strict=True))
        for plan in (before, after)
    )
    assert {file for file in old if new.get(file) != old[file]} == {"a.py", "pkg/b.go"}
    assert new["pkg/moved.go"] == old["pkg/b.go"]
    assert new["a.py"] == "git:" + run_git(repository, "hash-object", "a.py")
    assert [part.file for part in after.parts(np.arange(len(new)) == 0)] == ["a.py"]


def test_a_listing_is_the_same_in_pieces_of_any_size(repository, monkeypatch):
    whole = sources.plan(repository, commit="HEAD").listing
    ids = {line.split()[2] for line in run_git(repository, "ls-tree", "-r", "HEAD").splitlines()}
    assert set(whole.paths) <= ids and list(whole.names) == sorted(whole.names)
    for size in (1, 7, 100):
        monkeypatch.setattr(git, "LISTED_BYTES", size)
        assert sources.plan(repository, commit="HEAD").listing == whole


def test_submodules_and_pointers_are_counted(repository, tmp_path):
    run_git(repository, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", f"{repository}/.git", "sub")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
    for name in ("model.txt", "code.py", "rows.csv", "rows.jsonl", "rows.parquet"):
        (repository / name).write_text(pointer)
    commit(repository)
    plan = sources.plan(repository, commit="HEAD")
    assert plan.ignored["submodule"] == 1
    refused = [*plan.rejected, *(record for record in read_all(plan) if isinstance(record, Rejected))]
    pointers = {record.file for record in refused if record.reason == "git LFS pointer"}
    assert pointers == {"model.txt", "code.py", "rows.csv", "rows.jsonl", "rows.parquet"}
    with pytest.raises(DataError, match="rows.csv' is a git LFS pointer: .*git lfs pull"):
        sources.plan(repository / "rows.csv")


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("mian", "has no commit 'mian'. Did you mean 'main'"),
        ("--output=/tmp/x", "has no commit '--output=/tmp/x'"),
        ("-h", "has no commit '-h'"),
        ("", "has no commit ''"),
        ("main\n", r"has no commit 'main\\n'"),
        ("main:a.py", "has no commit 'main:a.py'"),
        ("0" * 40, "has no commit '0000"),
    ],
)
def test_an_unknown_commit_is_a_sentence(repository, ref, message):
    with pytest.raises(DataError, match=message) as caught:
        sources.plan(repository, commit=ref)
    assert "\n" not in str(caught.value)


def test_what_is_no_repository_is_a_sentence(tmp_path, repository, monkeypatch):
    (tmp_path / "plain").mkdir()
    with pytest.raises(DataError, match="plain' is not in a git repository; leave out --commit"):
        sources.plan(tmp_path / "plain", commit="HEAD")
    with pytest.raises(DataError, match="there is no folder .*absent"):
        sources.plan(tmp_path / "absent", commit="HEAD")
    run_git(tmp_path, "init", "--quiet", "unborn")
    with pytest.raises(DataError, match="unborn' has no commit 'HEAD'"):
        sources.plan(tmp_path / "unborn", commit="HEAD")
    with pytest.raises(DataError, match=r"git\+svn://x': repositories come by git\+ one of https"):
        sources.plan("git+svn://x")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="git is not installed"):
        sources.plan(repository, commit="HEAD")


def test_another_users_repository_is_left_to_its_owner(repository, monkeypatch):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(DataError, match="belongs to another user.*git config --global --add safe.directory"):
        sources.plan(repository, commit="HEAD")


def test_nothing_of_a_repository_runs(repository, tmp_path):
    trace = tmp_path / "it ran"
    script = tmp_path / "evil.sh"
    script.write_text(f'#!/bin/sh\ntouch "{trace}"\nexit 1\n')
    script.chmod(0o755)
    (repository / ".gitattributes").write_text("*.py filter=evil diff=evil text eol=crlf\n")
    commit(repository)
    hooks = repository / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)
    for hook in ("post-checkout", "pre-auto-gc", "reference-transaction", "fsmonitor-watchman"):
        (hooks / hook).write_text(script.read_text())
        (hooks / hook).chmod(0o755)
    for key, value in {
        **{"core.fsmonitor": script, "core.sshCommand": script, "core.pager": script, "core.askPass": script},
        **{"filter.evil.smudge": script, "diff.evil.textconv": script, "alias.cat-file": f"!{script}"},
        **{"remote.origin.url": "ssh://127.0.0.1/x", "remote.origin.promisor": "true"},
        **{"credential.helper": f"!{script}", "uploadpack.packObjectsHook": script},
    }.items():
        run_git(repository, "config", key, str(value))
    run_git(repository, "config", "core.repositoryFormatVersion", "1")
    run_git(repository, "config", "extensions.partialClone", "origin")
    missing = run_git(repository, "rev-parse", "HEAD:a.py")
    trace.unlink(missing_ok=True)
    assert "a.py" in texts(sources.plan(repository, commit="HEAD"))
    (repository / ".git" / "objects" / missing[:2] / missing[2:]).unlink()
    with pytest.raises(
        DataError, match="a.py' is not in the repository"
    ):  # of a partial clone git would fetch what it lacks
        read_all(sources.plan(repository, commit="HEAD"))
    assert not trace.exists()


def test_settings_of_a_surrounding_git_do_not_lead_astray(repository, tmp_path, monkeypatch):
    wanted = texts(sources.plan(repository, commit="HEAD"))
    run_git(tmp_path, "init", "--quiet", "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "other" / ".git" / "index"))
    assert texts(sources.plan(repository, commit="HEAD")) == wanted


def test_replaced_objects_do_not_change_what_an_id_means(repository):
    plan = sources.plan(repository, commit="HEAD")
    wanted = texts(plan)
    blob = run_git(repository, "rev-parse", "HEAD:a.py")
    (repository / "other.py").write_text("replaced\n")
    run_git(repository, "replace", blob, run_git(repository, "hash-object", "-w", "other.py"))
    assert texts(plan) == wanted


def test_repositories_of_sha256_objects(tmp_path):
    folder = tmp_path / "long ids"
    folder.mkdir()
    run_git(folder, "init", "--quiet", "--object-format=sha256", "--initial-branch=main")
    (folder / "a.py").write_text("a = 1\n")
    id = commit(folder)
    plan = sources.plan(folder, commit=id)
    assert len(id) == 64 and texts(plan) == {"a.py": "a = 1\n"} and plan.source["commit"] == id


def test_a_damaged_repository_is_a_sentence(repository):
    plan = sources.plan(repository, commit="HEAD")
    blob = run_git(repository, "rev-parse", "HEAD:a.py")
    loose = repository / ".git" / "objects" / blob[:2] / blob[2:]
    loose.chmod(0o644)
    content = bytearray(loose.read_bytes())
    content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    loose.write_bytes(content)
    with pytest.raises(DataError, match="cannot read .*:a.py'"):
        read_all(plan)
    [other] = plan.parts(np.array([file == "pkg/b.go" for file in plan.files["file"].to_pylist()]))
    with pytest.raises(DataError):
        list(read_part(plan.root, plan.parts()[0]))
    assert [record.text for record in read_part(plan.root, other)] == ["package b\n"], (
        "the next file is read all the same"
    )
    loose.unlink()
    with pytest.raises(DataError, match="is not in the repository"):
        read_all(plan)


def test_a_folder_that_is_missing_in_a_repository_is_an_error_not_an_omission(repository):
    tree = run_git(repository, "rev-parse", "HEAD:pkg")
    (repository / ".git" / "objects" / tree[:2] / tree[2:]).unlink()
    with pytest.raises(DataError, match=f"git cannot read .*{tree}"):
        sources.plan(repository, commit="HEAD")


def test_the_reading_process_ends_with_its_place(repository):
    place = sources.plan(repository, commit="HEAD").root
    [entry] = place.entries(lambda name: None if name == "a.py" else "other", Counter()).entries()
    with place.open(entry) as stream:
        assert stream.read() == b"a = 1\n"
    process = place._contents._process
    assert process.poll() is None
    del place
    assert process.wait(timeout=5) is not None


@pytest.fixture
def server(repository) -> Iterator[str]:
    """The repository behind git's own server on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = repository.parent
    words = [
        "git",
        "daemon",
        f"--base-path={base}",
        "--export-all",
        "--listen=127.0.0.1",
        f"--port={port}",
        "--reuseaddr",
    ]
    process = subprocess.Popen([*words, str(base)], stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(100):
            with socket.socket() as attempt:
                if attempt.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        (base / "repo").symlink_to(repository)
        yield f"git+git://127.0.0.1:{port}/repo"
    finally:
        os.killpg(process.pid, 15)
        process.wait()


def objects(repository: Path) -> int:
    counts = dict(line.split(": ") for line in run_git(repository, "count-objects", "-v").splitlines())
    return int(counts["count"]) + int(counts["in-pack"])


def test_a_remote_commit_is_fetched_once_and_then_only_what_is_new(repository, server):
    run_git(repository, "tag", "-a", "v1", "-m", "first")
    said: list[str] = []
    plan = sources.plan(server, commit="v1", report=said.append)
    local = sources.plan(repository, commit="v1")
    assert read_all(plan) == read_all(local) and plan.files == local.files
    assert plan.source["url"] == server.removeprefix("git+") and plan.source["name"] == "repo"
    assert len(said) == 1 and said[0].startswith("fetching ")
    before = objects(plan.root.repository)
    (repository / "a.py").write_text("a = 4\n")
    run_git(repository, "rm", "--quiet", "pkg/b.go")
    new = commit(repository)
    assert texts(sources.plan(server, commit="main", report=said.append))["a.py"] == "a = 4\n"
    assert len(said) == 2 and objects(plan.root.repository) - before <= 4, "a commit, two trees and a content"
    assert texts(sources.plan(server, commit=new, report=said.append))["a.py"] == "a = 4\n" and len(said) == 2
    assert texts(sources.plan(server))["a.py"] == "a = 4\n", "HEAD without a commit"
    assert read_all(plan) == read_all(local), "what was fetched before is still there"


def test_a_fetch_that_was_killed_is_done_again(repository, server):
    plan = sources.plan(server)
    cache = plan.root.repository
    wanted = texts(plan)
    run_git(cache, "update-ref", "-d", f"{git.FETCHED}/{plan.root.commit}")
    blob = run_git(cache, "rev-parse", f"{plan.root.commit}:a.py")
    loose = cache / "objects" / blob[:2] / blob[2:]
    if loose.exists():
        loose.unlink()
    else:
        for pack in (cache / "objects" / "pack").iterdir():
            pack.unlink()
    assert texts(sources.plan(server)) == wanted


def test_a_process_on_another_machine_fetches_for_itself(repository, server, tmp_path, monkeypatch):
    plan = sources.plan(server)
    wanted = read_all(plan)
    tasks = plan.tasks()
    os.rename(plan.root.repository, tmp_path / "away")
    place = pickle.loads(pickle.dumps(plan.root))
    assert [record for task in tasks for part in task for record in read_part(place, part)] == wanted


@pytest.mark.parametrize(
    ("path", "ref", "message"),
    [
        ("", "mian", "repo' has no branch or tag 'mian'. Did you mean 'main'"),
        ("", "-x", "has no branch or tag '-x'"),
        ("", "abc1234", "has no branch or tag 'abc1234'. Give the whole id of a commit"),
        ("", "0" * 40, "git cannot read 'git://127.0.0.1:.*/repo'"),
        ("2", "main", "git cannot read 'git://127.0.0.1:.*/repo2'"),
    ],
)
def test_remote_errors_are_sentences(server, path, ref, message):
    with pytest.raises(DataError, match=message) as caught:
        sources.plan(server + path, commit=ref)
    assert "\n" not in str(caught.value)


def test_passwords_of_a_url_are_not_told(tmp_path):
    with pytest.raises(DataError, match="git cannot read 'https://127.0.0.1:1/x.git'") as caught:
        sources.plan("git+https://someone:s3cret@127.0.0.1:1/x.git")
    assert "s3cret" not in str(caught.value) and "someone" not in str(caught.value)
    place = git.GitFiles(tmp_path, "0" * 40, "x", "main", "https://someone:s3cret@host/x.git?token=s3cret")
    assert "s3cret" not in repr(place) and "s3cret" not in json.dumps(place.provenance())
