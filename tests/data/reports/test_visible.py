"""Nothing that steers a terminal or a page is left in a visible text; everything else is."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as hyp

from blues.data.reports.visible import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, äöü, 漢字, a\u0301", "plain text, äöü, 漢字, a\u0301"),
        ("red \x1b[31m", "red ␛[31m"),
        ("\0\a\b\r\x7f", "␀␇␈␍␡"),
        ("a\tb\n", "a⇥b↵"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202eevil\u2066", "\\u202eevil\\u2066"),
        ("line\u2028break", "line\\u2028break"),
        ("\udc80", "\\udc80"),
        ("\U000e0041", "\\U000e0041"),
        ("👩\u200d🚀", "👩\u200d🚀"),
    ],
)
def test_steering_characters_are_shown(text, shown):
    assert visible(text) == shown


def test_what_is_to_stay_stays():
    assert visible("a\nb\x1b", keep="\n") == "a\nb␛"


@given(hyp.text(hyp.characters()))
def test_no_steering_character_is_left(text):
    shown = visible(text)
    assert all(unicodedata.category(char)[0] != "C" or char in "\u200c\u200d" for char in shown)
    shown.encode("utf-8")
    assert visible(shown) == shown
