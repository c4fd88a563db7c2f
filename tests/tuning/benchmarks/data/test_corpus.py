"""The corpus: text only, nothing twice, the same for the same request."""

from __future__ import annotations

from pathlib import Path

import pytest

from blues.errors import DataError
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


def test_the_same_request_uses_the_copy_and_another_one_makes_its_own(root, tmp_path):
    first = collect(tmp_path / "corpus", [root])
    (root / "a.py").write_bytes(b"changed = True\n")
    assert collect(tmp_path / "corpus", [root]) == first
    other = collect(tmp_path / "corpus", [root, root / "package"])
    assert other.xxh3 != first.xxh3 and "0/package/copy_of_a.py" in files_of(other)
    small = collect(tmp_path / "corpus", [root], max_bytes=6)
    assert small.files == 1 and len(files_of(small)) == 1  # nothing of the larger copy is left


def test_a_share_is_every_nth_file_without_copying(root, tmp_path):
    share = share_of(collect(tmp_path / "corpus", [root]), tmp_path / "half", 2)
    assert files_of(share) == ["0/a.py"] and share.bytes == 6
    assert (tmp_path / "half/0/a.py").samefile(tmp_path / "corpus/0/a.py")


def test_a_folder_without_python_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no Python file below"):
        collect(tmp_path / "corpus", [tmp_path / "empty"])
