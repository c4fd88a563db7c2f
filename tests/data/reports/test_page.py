"""The page says what the report says, whatever the names in a dataset are; a browser has nothing to run or to load."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from blues.data.merging.merge import merge
from blues.data.reports import charts
from blues.data.reports.page import render, write_page
from blues.data.reports.verify import verify
from blues.data.storage.store import Issue, Store
from blues.data.storage.versions import drop_documents
from blues.errors import ConfigError
from tests.data.datasets import make_store

HOSTILE = 'a <script>alert("1")</script> & \x1b[31m'
ALLOWED = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "header",
        "section",
        "div",
        "span",
        "p",
        "b",
        "i",
        "em",
    ),
    *("h1", "h2", "h3", "h4", "ul", "li", "code", "small", "table", "thead", "tbody", "tr", "th", "td", "svg", "rect"),
    *("path", "text"),
}


class Elements(HTMLParser):
    """Every element with its attributes, and the texts; complains of what is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def parse(page: str) -> Elements:
    elements = Elements()
    elements.feed(page)
    assert elements.open == []
    return elements


@pytest.fixture
def mix(tmp_path) -> Path:
    """A merged dataset with copies, two versions, and hostile names."""
    first = make_store(tmp_path / 'a <i>&"b"', train=[["one", "two", "one", HOSTILE], ["same"]], validation=[["same"]])
    second = make_store(tmp_path / "more", train=[["one", "other words"]], validation=[["nine"]])
    drop_documents(Store.open(first), {"train": [0]}, {"kind": f"{HOSTILE}"})
    merge([first, second], tmp_path / "mix", weights=[0.75, 0.25])
    return tmp_path / "mix"


def test_the_page_is_well_formed_and_holds_nothing_to_run_or_load(mix):
    page = render(verify(mix))
    elements = parse(page)
    assert {tag for tag, _ in elements.seen} <= ALLOWED
    for _, attributes in elements.seen:
        assert not {name for name in attributes if name.startswith("on") or name in ("src", "href", "action")}
    assert "default-src 'none'" in page and "http:" not in page and "https:" not in page
    assert not re.search(r"url\(|@import|javascript", page)
    assert not any(ord(char) < 32 and char != "\n" for char in page)


def test_it_says_what_the_report_says(mix):
    report = verify(mix)
    texts = parse(render(report)).texts
    for line in report.statistics:
        assert line.source in texts and f"{line.documents:,}" in texts and f"{line.tokens:,}" in texts
    assert "good: all checksums hold" in texts and "1 warning" in texts
    for title in ("Warnings", "Lengths of documents", "Shares of the mixture", "Vocabulary", "Where it came from"):
        assert title in texts
    assert "Issues" not in texts and "Rejected rows" not in texts
    assert "75.00%" in texts and "a <script>" in "".join(texts)


def test_issues_come_first_and_the_sources_without_any_are_described(mix, tmp_path):
    (tmp_path / "more" / "chunks" / "train-00001-00000.tokens").unlink()
    report = verify(mix)
    texts = parse(render(report)).texts
    assert texts.index("Issues") < texts.index("Warnings") < texts.index("Splits")
    assert "1 issue" in texts and any("What follows is of the sources without issues." in text for text in texts)
    assert str(tmp_path / "more" / "chunks" / "train-00001-00000.tokens") in texts


def test_a_dataset_of_which_nothing_can_be_read_has_a_page_too(tmp_path):
    path = make_store(tmp_path / "data", train=[["one"]])
    (path / "manifest.json").write_bytes(b"{")
    (path / "versions" / "00001" / "manifest.json").write_bytes(b"")
    texts = parse(render(verify(path))).texts
    assert "Issues" in texts and "Splits" not in texts and "2 issues" in texts


def test_the_file_is_written_whole_where_there_is_a_folder(mix, tmp_path):
    report = verify(mix)
    assert write_page(report, tmp_path / "verify.html").read_text(encoding="utf-8") == render(report)
    with pytest.raises(ConfigError, match="there is no folder"):
        write_page(report, tmp_path / "absent" / "verify.html")


def test_prose_shows_commands_as_code_and_escapes_the_rest():
    assert charts.prose("`blues <dedup>` & <b>") == "<code>blues &lt;dedup&gt;</code> &amp; &lt;b&gt;"


@pytest.mark.parametrize("counts", [(), (0, 0, 5), (1,) * 40, (0,) * 20 + (10**12,)])
def test_charts_take_any_counts(counts):
    drawn = charts.histogram(counts, (), 0, "label")
    assert "nan" not in drawn and parse(drawn).seen[0][0] == "svg"
    assert drawn.count("<rect") == sum(count > 0 for count in counts)


def test_curves_run_from_left_to_right_within_the_picture():
    drawn = charts.curves([[(1, 0.1), (10, 0.5), (3000, 1.0)], []], "ids", "label")
    [line] = re.findall(r'class="line"[^>]*d="M([^"]*)"', drawn)
    points = np.array([[float(number) for number in point.split()] for point in line.split("L")])
    assert (np.diff(points[:, 0]) > 0).all() and (np.diff(points[:, 1]) < 0).all()
    assert (points >= 0).all() and (points[:, 0] <= charts.WIDTH).all()


def test_many_issues_are_cut_with_a_word(tmp_path):
    report = verify(make_store(tmp_path / "data", train=[["one"]]))
    many = tuple(Issue(f"file {number}", "is damaged") for number in range(300))
    page = render(type(report)(paths=report.paths, issues=many))
    assert "file 199" in page and "file 200" not in page and "100 more issues" in page
