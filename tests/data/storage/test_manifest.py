"""What makes a folder a dataset is read with care, and nothing else is written into it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blues.cli import main
from blues.data.merging.merge import merge
from blues.data.storage.manifest import MANIFEST, MIXTURE, check_target, is_dataset, read_regular
from blues.data.storage.store import Store
from blues.errors import ConfigError, DataError
from tests.data.datasets import make_store, snapshot


@pytest.fixture
def path(tmp_path) -> Path:
    return make_store(tmp_path / "data", train=[["one two", "three"]], validation=[["four"]])


@pytest.fixture
def mix(path, tmp_path) -> Path:
    merge([path], tmp_path / "mix", strategy="equal")
    return tmp_path / "mix"


@pytest.mark.parametrize("name", ["page.html", "chunks/page.html", "versions/00001/page.html", "own/page.html"])
def test_no_report_is_written_into_a_dataset(path, mix, name):
    (path / "own").mkdir()
    check_target(path.parent / "page.html", "--page", (".html",))
    with pytest.raises(ConfigError, match="--page: .* lies in the dataset .*data'; write it elsewhere"):
        check_target(path / name, "--page", (".html",))
    with pytest.raises(ConfigError, match="lies in the dataset"):
        check_target(mix / "page.html", "--page", (".html",))
    (path / MANIFEST).write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="lies in the dataset"):
        check_target(path / name, "--page", (".html",))


def test_links_lead_into_no_dataset_either(path, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "data").symlink_to(path)
    (outside / "page.html").symlink_to(path / MANIFEST)
    (path / "page.html").symlink_to(tmp_path / "page.html")
    for target in (outside / "data" / "new.html", outside / "page.html", path / "page.html"):
        with pytest.raises(ConfigError, match="lies in the dataset"):
            check_target(target, "--page", (".html",))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("", "is a folder; name a file in it"),
        ("absent/x.html", "there is no folder"),
        ("x.pdf", r"has to end in \.html or \.htm"),
        ("x", "has to end in"),
    ],
)
def test_a_target_of_which_nothing_good_comes_is_a_sentence(tmp_path, name, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_target(tmp_path / name, "--page", (".html", ".htm"))
    check_target(tmp_path / "X.HTML", "--page", (".html", ".htm"))


def test_every_command_refuses_before_anything_is_computed(path, mix, tmp_path, capsys):
    before = snapshot(tmp_path)
    for words in (
        ["verify", str(mix), "--page", str(mix / MIXTURE)],
        ["verify", str(path), "--page", str(mix / "x.html")],
        ["inspect", str(path), "--plot", str(path / MANIFEST)],
        ["inspect", str(path), "--plot", str(path / "x.png")],
        ["dedup", str(path), "--report", str(path / MANIFEST)],
        ["dedup", str(path), "--report", str(path / "x.html")],
        ["merge", "--datasets", str(path), "--output", str(tmp_path / "new"), "--page", str(mix / MIXTURE)],
        ["merge", "--datasets", str(path), "--output", str(tmp_path / "new"), "--page", str(path / "x.html")],
    ):
        assert main(words) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and ("lies in the dataset" in err or "has to end in" in err)
    assert snapshot(tmp_path) == before


def test_brackets_without_end_are_damage(path, mix, capsys):
    (path / MANIFEST).write_text("[" * 200_000)
    with pytest.raises(DataError, match="is damaged .nested too deeply"):
        Store.open(path)
    for words in (["verify", str(path)], ["verify", str(mix)], ["inspect", str(path)]):
        assert main(words) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_what_is_no_regular_file_is_not_waited_for(path, capsys):
    (path / MANIFEST).unlink()
    os.mkfifo(path / MANIFEST)
    assert not is_dataset(path)
    with pytest.raises(OSError, match="it is no regular file"):
        read_regular(path / MANIFEST)
    with pytest.raises(DataError, match=r"cannot read .*manifest\.json.*: it is no regular file"):
        Store.open(path)
    assert main(["verify", str(path)]) == 2
    assert "it is no regular file" in capsys.readouterr().out
