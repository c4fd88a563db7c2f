"""The corpus: text only, nothing twice, the same for the same request."""

from __future__ import annotations

from pathlib import Path

import pytest

from blues.data.reading.readers import Document, read_part
from blues.data.reading.sources import plan
from blues.errors import DataError
from tuning.benchmarks.data import corpus as corpus_module
from tuning.benchmarks.data.corpus import collect, files_of, share_of

FILES = {
    "a.py": b"a = 1\n",
    "package/b.py": b"b = 2\n",
    "package/copy_of_a.py": b"a = 1\n",
    "package/empty.py": b"",
    "package/latin.py": b"# caf\xe9\n",
    "package/marked.py": b"\xef\xbb\xbfd = 4\n",
    "package/declared.py": b"# coding: latin-1\ne = 5\n",
    "package/unknown.py": b"# coding: uft-8\nf = 6\n",
    "package/notes.txt": b"no code",
    ".hidden/c.py": b"c = 3\n",
    "__pycache__/d.py": b"d = 4\n",
    "site-packages/e.py": b"e = 5\n",
    "package/blank.py": b" \n\t\r\n\x0c\n",
    "package/blank_of_unicode.py": "\u3000\n\u00a0\n".encode(),
    "package/nul.py": b"g = 7\0\n",
    "package/pointer.py": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.fixture
def root(tmp_path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "source"


def test_python_text_is_copied_once(root, tmp_path):
    corpus = collect(tmp_path / "corpus", [root])
    assert files_of(corpus) == ["0/a.py", "0/package/b.py"] and (corpus.files, corpus.bytes) == (2, 12)
    assert (tmp_path / "corpus/0/a.py").read_bytes() == FILES["a.py"]


def test_blues_takes_every_byte_of_it_and_nothing_that_it_would_have_taken_is_missing(root, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "MAX_DOCUMENT_BYTES", 40)
    (root / "longest.py").write_bytes(b"#" * 39 + b"\n")
    (root / "too_long.py").write_bytes(b"#" * 40 + b"\n")
    corpus = collect(tmp_path / "corpus", [root])

    def taken(folder) -> tuple[list[Document], int]:
        planned = plan(folder, kind="source", max_document_bytes=40)
        records = [record for task in planned.tasks() for part in task for record in read_part(planned.root, part)]
        return [record for record in records if isinstance(record, Document)], len(records)

    documents, records = taken(tmp_path / "corpus")
    assert len(documents) == records == corpus.files == 3
    assert sum(len(document.text.encode()) for document in documents) == corpus.bytes
    # Blues reads some more of the folders themselves: it knows marks and other encodings, and repeats what is repeated
    others = {"package/marked.py", "package/declared.py", "package/copy_of_a.py", "site-packages/e.py"}
    others.add("package/notes.txt")
    found = {document.source for document in taken(root)[0]}
    assert found - others == {"a.py", "package/b.py", "longest.py"} and others < found


def test_several_folders_are_one_corpus_and_the_work_folder_is_no_part_of_it(root, tmp_path):
    more = tmp_path / "more"
    more.mkdir()
    (more / "z.py").write_bytes(b"z = 26\n")
    work = more / "benchmark" / "data"
    for _ in range(2):  # the second one finds the first one's copy below a folder that it is made of
        corpus = collect(work / "corpus", [root, more], seed=_)
        assert files_of(corpus) == ["0/a.py", "0/package/b.py", "1/z.py"] and corpus.bytes == 19


def test_the_same_request_uses_the_copy_and_another_one_makes_its_own(root, tmp_path):
    first = collect(tmp_path / "corpus", [root])
    (root / "a.py").write_bytes(b"changed = True\n")
    assert collect(tmp_path / "corpus", [root]) == first
    other = collect(tmp_path / "corpus", [root, root / "package"])
    assert other.xxh3 != first.xxh3 and "0/package/copy_of_a.py" in files_of(other)
    small = collect(tmp_path / "corpus", [root], max_bytes=6)
    assert small.files == 1 and len(files_of(small)) == 1  # nothing of the larger copy is left


@pytest.mark.parametrize("harm", ["changed", "removed", "added"])
def test_a_copy_to_which_something_happened_is_made_anew(root, tmp_path, harm):
    first = collect(tmp_path / "corpus", [root])
    file = tmp_path / "corpus/0/a.py"
    if harm == "changed":
        file.write_bytes(b"a = 9\n")
    elif harm == "removed":
        file.unlink()
    else:
        file.with_name("more.py").write_bytes(b"m = 1\n")
    lines: list[str] = []
    assert collect(tmp_path / "corpus", [root], say=lines.append) == first
    assert lines == ["  corpus: made anew, what was kept has another content than it had"]
    assert files_of(first) == ["0/a.py", "0/package/b.py"] and file.read_bytes() == FILES["a.py"]


def test_a_share_is_every_nth_file_without_copying(root, tmp_path):
    share = share_of(collect(tmp_path / "corpus", [root]), tmp_path / "half", 2)
    assert files_of(share) == ["0/a.py"] and share.bytes == 6
    assert (tmp_path / "half/0/a.py").samefile(tmp_path / "corpus/0/a.py")
    whole = share_of(collect(tmp_path / "corpus", [root]), tmp_path / "half", 1)
    assert files_of(whole) == ["0/a.py", "0/package/b.py"]
    again = share_of(collect(tmp_path / "corpus", [root]), tmp_path / "half", 2)
    assert again == share and files_of(again) == ["0/a.py"]  # nothing of the other share is left


def test_a_folder_without_python_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no Python file below"):
        collect(tmp_path / "corpus", [tmp_path / "empty"])
