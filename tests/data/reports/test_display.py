"""What a terminal gets: every token in its place, and nothing that a terminal would obey."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hyp

from blues.data.reports import display
from blues.data.reports.inspection import choose_documents, overview, training_window
from tests.data.datasets import TOKENIZER, make_store

HOSTILE = "red \x1b[31m text\x07\nsecond\tline \u202e\n漢字 👩\u200d🚀"
COLORS = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    name = "data \x1b[2J"
    return make_store(tmp_path_factory.mktemp("display") / name, train=[[HOSTILE, "b" * 40]], validation=[["c"]])


@given(hyp.text(max_size=40))
def test_cells_are_the_text_of_tokens_in_order(text):
    tokenizer = TOKENIZER.build()
    text = text.encode("utf-8", "replace").decode("utf-8")
    tokens = np.array(tokenizer.encode(text), dtype=np.uint32)
    found = list(display.cells(tokens, tokenizer))
    assert "".join(found) == text and len(found) <= len(tokens)
    if text.isascii():
        assert len(found) == len(tokens)


def test_cells_of_bytes_that_are_no_text_do_not_wait_for_ever():
    tokenizer = TOKENIZER.build()
    first = [tokenizer.encoding.encode_single_token(bytes([byte])) for byte in b"\xe6\xbc"]
    letter = tokenizer.encoding.encode_single_token(b"a")
    assert list(display.cells(np.array([*first, letter, *first]), tokenizer)) == ["\ufffda", "\ufffd"]


@pytest.mark.parametrize("color", [False, True])
def test_a_document_shows_all_of_its_text_and_obeys_none_of_it(path, color):
    tokenizer = TOKENIZER.build()
    [look, *_] = choose_documents(path, 9, id="train-0-0")
    shown = "\n".join(display.document_lines(look, tokenizer, 1000, color=color))
    assert color == bool(COLORS.search(shown))
    plain = COLORS.sub("", shown)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\x9b\u202e]", plain)
    text = plain if color else plain.replace(display.SEPARATOR, "")
    assert "red ␛[31m text␇↵\nsecond⇥line \\u202e↵\n漢字 👩\u200d🚀\n" in text
    assert "train-0-0" in plain and "data ␛[2J" in plain


def test_tokens_are_separated_or_alternate_in_colour(path):
    tokenizer = TOKENIZER.build()
    [look, *_] = choose_documents(path, 9, id="train-0-1")
    cells = list(display.cells(look.document.tokens[:-1], tokenizer))
    assert display.SEPARATOR.join(cells) in display.document_lines(look, tokenizer, 1000, color=False)
    [line] = [
        line for line in display.document_lines(look, tokenizer, 1000, color=True) if "bb" in COLORS.sub("", line)
    ]
    colors = COLORS.findall(line)[::2]
    assert colors == [display.BACKGROUNDS[number % 2] for number in range(len(cells))]


def test_a_long_document_is_cut_with_a_note(path):
    tokenizer = TOKENIZER.build()
    [look, *_] = choose_documents(path, 9, id="train-0-1")
    count = len(look.document.tokens) - 1
    lines = display.document_lines(look, tokenizer, 3, color=False)
    assert f"({count - 3} of {count} tokens are not shown)" in lines


def test_a_window_names_its_documents(path):
    window = training_window(path, 0, 4)
    lines = display.window_lines(window, TOKENIZER.build(), 100, color=False)
    assert "sample 0 of train, packing stream" in lines[0] and "before the first target stands" in lines[1]
    assert len([line for line in lines if line.startswith("──")]) == len(window.pieces)
    assert not any("\x1b" in line for line in lines)


def test_the_overview_lists_splits_facts_and_lengths(path):
    found = overview(path)
    lines, longest = display.overview_lines(found), found.sources[0].splits[0].lengths.longest
    assert not any("\x1b" in line for line in lines)
    row = next(line for line in lines if "train" in line)
    assert row.split()[-7:-4] == ["1", "0.00", "none"] and row.split()[-1] == f"{longest:,}"
    assert any("version 1, made by prepare" in line for line in lines)
    assert sum("lengths of data" in line for line in lines) == 2


def test_a_separator_within_a_text_is_told_apart(tmp_path):
    path = make_store(tmp_path / "data", train=[["a|b\u2502c"]])
    [look] = choose_documents(path, 1)
    lines = display.document_lines(look, TOKENIZER.build(), 100, color=False)
    assert display.LEGEND in lines and "a\u2502|\u2502b\u2502\\u2502\u2502c" in lines
    assert "a|b\u2502c" in COLORS.sub("", "\n".join(display.document_lines(look, TOKENIZER.build(), 100, color=True)))


def test_facts_are_words(path):
    [source] = overview(path).sources
    operation = {"kind": "dedup", "settings": {"across_only": True, "near": {"ngram": 5}}, "datasets": [{"exact": 1}]}
    settings = {"shard_tokens": 16777216, "threshold": hex(1 << 60)}
    changed = replace(source, version=3, versions=(1, 2, 3), operation=operation, settings=settings)
    origin = {"kind": "local", "bytes": 35_412, "name": ""}
    text = "\n".join(display.overview_lines(replace(overview(path), sources=(replace(changed, origins=(origin,)),))))
    assert "(settings (across only yes, near (ngram 5)), datasets (exact 1)); versions 1 and 2 are kept" in text
    assert "shard tokens 16,777,216, held out 0.0625 of the documents" in text and "kind local, 35.4 kB" in text
    assert "0x" not in text and "{" not in text
    text = "\n".join(display.overview_lines(replace(overview(path), sources=(replace(changed, versions=(2, 3)),))))
    assert "; version 2 is kept" in text


@given(hyp.lists(hyp.integers(0, 1000), max_size=25))
def test_histograms_show_every_bin_from_the_first_that_has_any(bins):
    lines = display.histogram_lines(bins)
    first = next((k for k, count in enumerate(bins) if count), len(bins))
    assert len(lines) == 1 + len(bins) - first
    for line, count in zip(lines[1:], bins[first:], strict=True):
        bar = "".join(char for char in line if char in display.EIGHTHS[1:] + display.FULL)
        assert (count > 0) == bool(bar) and len(bar) <= display.BAR_WIDTH
