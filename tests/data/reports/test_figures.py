"""Figures of a dataset are pictures, whatever the names of its sources are."""

from __future__ import annotations

import pytest

from blues.data.merging.merge import merge
from blues.data.reports.figures import lengths_figure
from blues.data.reports.inspection import overview
from tests.data.datasets import make_store


@pytest.mark.parametrize(("suffix", "magic"), [("svg", b"<?xml"), ("pdf", b"%PDF"), ("PNG", b"\x89PNG")])
def test_a_picture_is_of_the_kind_that_its_name_says(tmp_path, suffix, magic):
    found = overview(make_store(tmp_path / "data", train=[["one"]]))
    assert lengths_figure(found, tmp_path / f"lengths.{suffix}").read_bytes().startswith(magic)


def test_the_lengths_of_any_dataset_are_a_picture(tmp_path):
    first = make_store(tmp_path / "price in $ and $x^2 \u202e", train=[["one", "two " * 50]], validation=[["three"]])
    second = make_store(tmp_path / "other", train=[["four"]])
    merge([first, second], tmp_path / "mix", strategy="equal")
    for path in (first, tmp_path / "mix"):
        output = tmp_path / "lengths.png"
        assert lengths_figure(overview(path), output) == output
        assert output.read_bytes().startswith(b"\x89PNG")
        output.unlink()
