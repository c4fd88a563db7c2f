"""Whatever a file is written in, its text comes out in UTF-8; bytes that cannot be decoded spoil their row alone."""

from __future__ import annotations

import codecs
import gzip
import io
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blues.data.reading import streams
from blues.data.reading.places import LocalFiles
from blues.data.reading.streams import (
    MARK,
    DamagedStream,
    Lines,
    LineTooLong,
    Transcoded,
    buffered,
    codec,
    compression_of,
    cookie,
    decode,
    marked,
    open_stream,
)
from blues.errors import DataError

LAX = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ENCODINGS = (
    "utf-16-le",
    "utf-32-be",
    "latin-1",
    "cp1252",
    "shift_jis",
    "gb18030",
    "euc-kr",
    "utf-7",
    "ascii",
)


@LAX
@given(content=st.binary(max_size=200), encoding=st.sampled_from(ENCODINGS), block=st.integers(1, 9))
def test_a_stream_gives_what_decoding_at_once_gives(monkeypatch, content, encoding, block):
    wanted = decode(content, encoding)
    monkeypatch.setattr(streams, "BLOCK_BYTES", block)
    assert buffered(Transcoded(io.BufferedReader(io.BytesIO(content)), encoding)).read() == wanted  # type: ignore[arg-type]


@LAX
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80), encoding=st.sampled_from(ENCODINGS))
def test_what_can_be_decoded_is_the_text(text, encoding):
    try:
        content = text.encode(encoding)
    except UnicodeEncodeError:
        content = text.encode(encoding, "ignore")
        text = content.decode(encoding)
    assert decode(content, encoding) == text.encode()


def test_bytes_that_cannot_be_decoded_are_never_valid_utf8():
    """Not even where two of them side by side would be, as they are in UTF-8."""
    assert decode("é".encode(), "ascii") == MARK * 2
    assert decode(b"a\x81b", "cp1252") == b"a" + MARK + b"b"
    assert decode("a\ud800b".encode("utf-16-le", "surrogatepass"), "utf-16-le") == b"a" + MARK + b"b"
    with pytest.raises(UnicodeDecodeError):
        (b"good" + MARK + b"good").decode()


@pytest.mark.parametrize(
    ("given_name", "name"),
    [
        ("UTF8", "utf-8"),
        ("utf-8-sig", "utf-8"),
        ("Latin1", "iso8859-1"),
        ("UTF-16LE", "utf-16-le"),
        ("sjis", "shift_jis"),
    ],
)
def test_names_of_encodings(given_name, name):
    assert codec(given_name) == name


@pytest.mark.parametrize(
    "name", ["no-such", "base64", "rot13", "punycode", "idna", "undefined", "unicode_escape", "", "a\0b"]
)
def test_what_is_no_encoding_of_files_is_refused(name):
    with pytest.raises(DataError, match=r"unknown encoding .*\(--encoding\)\. .* Any text encoding of Python"):
        codec(name)


def test_the_nearest_encoding_is_named():
    with pytest.raises(DataError, match="Did you mean 'shift_jis'"):
        codec("shift-jiss")


@pytest.mark.parametrize(
    ("source", "encoding"),
    [
        (b"# -*- coding: latin-1 -*-\n", "latin-1"),
        (b"#!/usr/bin/python\n# vim: set fileencoding=cp1252 :\nx = 1\n", "cp1252"),
        (b"\n#coding=utf-8", "utf-8"),
        (b"x = 1\n# coding: latin-1\n", None),
        (b"\n\n# coding: latin-1\n", None),
        (b"'''\n# coding: latin-1\n", None),
        (b"", None),
        (b"# coding of the thing\n", None),
    ],
)
def test_the_encoding_that_python_source_names(source, encoding):
    assert cookie(source) == encoding


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_decides(tmp_path: Path, encoding):
    mark = {
        **{"utf-8": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE},
        **{"utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE},
    }[encoding]
    assert marked(mark + b"x") == encoding.removesuffix("-le").removesuffix("-be")
    content = mark + "text, ünï".encode(encoding)
    for name, packed in (("a.txt", content), ("a.txt.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(packed)
        place = LocalFiles(tmp_path)
        for asked in ("utf-8", "cp1252", encoding):
            stream, found = open_stream(place, place.entry(name), asked)
            with stream:
                assert stream.read().removeprefix(codecs.BOM_UTF8).decode() == "text, ünï"
            assert found == marked(mark)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_compressed_streams_in_another_encoding(tmp_path: Path, pack):
    text = "".join(f"Zeile {n}, für alle\n" for n in range(20_000))
    suffix = ".gz" if pack is gzip.compress else ".zst"
    packed = pack(text.encode("cp1252"))
    (tmp_path / f"whole{suffix}").write_bytes(packed)
    (tmp_path / f"cut{suffix}").write_bytes(packed[: len(packed) // 2])
    place = LocalFiles(tmp_path)
    stream, _ = open_stream(place, place.entry(f"whole{suffix}"), "cp1252")
    with stream:
        assert stream.read().decode() == text
    stream, _ = open_stream(place, place.entry(f"cut{suffix}"), "cp1252")
    with stream, pytest.raises(DamagedStream):
        stream.read()


def test_several_compressed_members_are_one_stream(tmp_path: Path):
    place = LocalFiles(tmp_path)
    for name, pack in (("a.gz", gzip.compress), ("a.zst", zstandard.compress)):
        (tmp_path / name).write_bytes(pack(b"one\n") + pack(b"two\n") + pack(b""))
        stream, _ = open_stream(place, place.entry(name))
        with stream:
            assert stream.read() == b"one\ntwo\n"


@pytest.mark.parametrize(("name", "kind"), [("a.GZ", "gzip"), ("a.jsonl.zst", "zstd"), ("a.gzip", None), ("gz", None)])
def test_compression_by_name(name, kind):
    assert compression_of(name) == kind


def test_lines_know_where_they_end_and_skip_what_is_too_long():
    content = b"short\n" + b"x" * 35 + b"\nafter\nlast"
    lines = Lines(io.BufferedReader(io.BytesIO(content)), limit=10)  # type: ignore[arg-type]
    assert next(lines) == b"short\n" and lines.position == 6
    with pytest.raises(LineTooLong):
        next(lines)
    assert lines.position == 42
    assert list(lines) == [b"after\n", b"last"] and lines.position == len(content) and lines.count == 4
    again = Lines(io.BufferedReader(io.BytesIO(content)), 42, 10)  # type: ignore[arg-type]
    assert list(again) == [b"after\n", b"last"] and again.position == len(content)
