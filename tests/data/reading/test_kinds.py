"""What a file holds follows from its suffix, as pathlib understands one."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as hyp

from blues.data.reading.kinds import KIND_OF, KINDS, TABLE_KINDS, guess_kind, language_of, suffix_of


@settings(max_examples=200, deadline=None)
@given(name=hyp.lists(hyp.sampled_from([".", "/", "a", "py", "GZ", "gz", "jsonl", "é"]), min_size=1).map("".join))
@example(name="a.d/README")
@example(name="a/.py")
def test_a_suffix_is_what_pathlib_says(name):
    last = name.rpartition("/")[2]
    suffix = "" if last.endswith(".") else PurePosixPath(last).suffix
    inner = suffix_of(last.removesuffix(suffix)) if suffix.lower() in (".gz", ".zst") else ""
    assert suffix_of(name) == inner + suffix


@pytest.mark.parametrize(
    ("name", "suffix", "kind", "language"),
    [
        ("pkg/a.py", ".py", "source", "python"),
        ("A.PY", ".PY", "source", "python"),
        ("a.b.jsonl.gz", ".jsonl.gz", "jsonl", None),
        ("a.CSV.ZST", ".CSV.ZST", "csv", None),
        ("read.me.md.gz", ".md.gz", "text", "markdown"),
        ("notes.txt", ".txt", "text", None),
        ("a.py.gz", ".py.gz", None, "python"),
        ("a.parquet.gz", ".parquet.gz", None, None),
        ("a.gz", ".gz", None, None),
        ("a.gz.gz", ".gz.gz", None, None),
        ("a.d/README", "", None, None),
        ("a/.py", "", None, None),
        ("a.", "", None, None),
        (".py", "", None, None),
        ("", "", None, None),
    ],
)
def test_kinds_and_languages(name, suffix, kind, language):
    assert (suffix_of(name), guess_kind(suffix), language_of(suffix)) == (suffix, kind, language)


def test_every_kind_is_one_of_the_kinds():
    assert set(KIND_OF.values()) == set(KINDS) and set(KINDS) > TABLE_KINDS
