"""What an earlier run left is used again if it is what would be made now, and else never."""

from __future__ import annotations

import json

import pytest

from tuning.benchmarks.data.kept import clear, code_of, kept


class Maker:
    """Writes a file, and counts how often it was asked to."""

    def __init__(self) -> None:
        self.made, self.lines = 0, []

    def __call__(self, target):
        target.mkdir()
        self.made += 1
        (target / "file").write_text(str(self.made))
        return {"made": self.made}

    def get(self, target, **request):
        return kept(target, request, self, say=self.lines.append)


@pytest.fixture
def maker() -> Maker:
    return Maker()


def test_the_same_request_is_made_once(maker, tmp_path):
    request = {"corpus": "a1", "sizes": (1, 2)}  # tuples come back as lists
    assert maker.get(tmp_path / "work" / "x", **request) == {"made": 1} == maker.get(tmp_path / "work" / "x", **request)
    assert maker.made == 1 and len(maker.lines) == 1
    assert maker.lines[0].startswith("  x: kept from 2") and maker.lines[0].endswith(", made of the same")


def test_another_request_is_made_anew_and_it_is_said_what_differs(maker, tmp_path):
    maker.get(tmp_path / "x", corpus="a1", code="c1")
    assert maker.get(tmp_path / "x", corpus="a2", code="c1") == {"made": 2}
    assert maker.get(tmp_path / "x", corpus="a2", code="c1", seed=0) == {"made": 3}
    assert (tmp_path / "x" / "file").read_text() == "3"
    assert maker.lines == [
        "  x: made anew, what was kept has another corpus",
        "  x: made anew, what was kept has another seed",
    ]


def test_what_is_unfinished_or_changed_is_made_anew(maker, tmp_path):
    target = tmp_path / "x"
    target.mkdir()
    (target / "half").touch()
    maker.get(target, code="c1")
    assert maker.lines == ["  x: made anew, what was kept is unfinished"] and not (target / "half").exists()
    assert kept(target, {"code": "c1"}, maker, intact=lambda facts: facts["made"] != 1) == {"made": 2}


def test_a_maker_that_fails_leaves_nothing_that_would_be_taken_for_whole(maker, tmp_path):
    def fails(target):
        target.mkdir()
        raise OSError("full")

    maker.get(tmp_path / "x", code="c1")
    with pytest.raises(OSError, match="full"):
        kept(tmp_path / "x", {"code": "c2"}, fails)
    assert maker.get(tmp_path / "x", code="c1") == {"made": 2}


def test_notes_go_first_and_nothing_is_left(maker, tmp_path):
    maker.get(tmp_path / "data" / "x", code="c1")
    assert json.loads((tmp_path / "data" / "x.made.json").read_text())["facts"] == {"made": 1}
    clear(tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_the_checksum_of_code_is_of_its_files_alone(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("a = 1")
        (tmp_path / name / "notes.txt").write_text(name)
    assert (
        code_of(tmp_path / "one") == code_of(tmp_path / "two") != code_of(tmp_path / "one" / "a.py", tmp_path / "two")
    )
    (tmp_path / "two" / "b.py").touch()
    assert code_of(tmp_path / "one") != code_of(tmp_path / "two")
