"""Streams of source files: decompressed, in UTF-8 whatever encoding the file has, line by line.

In: an `Entry` at a `Place` and the encoding the person named. Out: a binary stream of UTF-8, and `Lines` of one.

A byte order mark decides over the named encoding. What cannot be decoded becomes MARK, a byte that UTF-8 never has, so
that it spoils its own row or piece and nothing else. UTF-8 itself is passed on as it is: parts of a file are read by
seeking, and its faults are found where rows become texts.
"""

from __future__ import annotations

import codecs
import io
import re
import shutil
import tempfile
from typing import Any, BinaryIO, cast

import pyarrow as pa

from blues.config import nearest
from blues.data.reading.places import Entry, Place
from blues.errors import DataError

MAX_DOCUMENT_BYTES = 128 << 20
"""Rows, and files of source code, that are longer are rejected, unless the person says otherwise."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BEGINNINGS = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
UTF8 = "utf-8"
UTF8_MARK = codecs.BOM_UTF8
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, UTF8),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
MARK = b"\xff"
"""Stands for bytes that cannot be decoded."""
BLOCK_BYTES = 1 << 16

USUAL_ENCODINGS = ("utf-8", "utf-16", "utf-32", "latin-1", "cp1252", "shift_jis", "gb18030", "euc-kr", "big5")
NOT_OF_FILES = frozenset(("idna", "punycode", "raw_unicode_escape", "unicode_escape", "undefined", "mbcs", "oem"))
"""Codecs of Python from bytes to text that no file is written in. Some of them take quadratic time."""
CODING = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")
BLANK = re.compile(rb"^[ \t\f]*(?:[#\r\n]|$)")


class DamagedStream(Exception):
    """A .gz or .zst file is truncated or damaged from here on. (Failing to read the file at all is an OSError.)"""


class LineTooLong(Exception):
    """A line longer than a document may be; the stream stands behind it."""


def longer_than(limit: int) -> str:
    """Why a row of more than `limit` bytes is rejected, and what to do."""
    return f"longer than {limit / 2**20:g} MiB; raise --max-document-mb to read it"


DAMAGES = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What Arrow raises for damaged content, and the system for what it cannot read; `damage` tells them apart."""


def damage(error: Exception) -> str:
    """What is wrong with the content, in one line; an error of the system, which has a number, is raised again."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return " ".join(str(error).split())[:300]


def codec(encoding: str) -> str:
    """Python's name of an encoding of text files; `utf-8` also for `UTF8` and `utf-8-sig`, whose mark is always read.

    Raises:
        DataError: there is none of this name.
    """
    try:
        found = codecs.lookup(encoding)
        name = found.name.removesuffix("-sig")
        if name.replace("-", "_") not in NOT_OF_FILES and found.incrementaldecoder is not None:
            " ".encode(name)  # refuses codecs from bytes to bytes or from text to text, such as base64 and rot13
            return f"{name}-le" if name in ("utf-16", "utf-32") else name  # with a mark, the mark decides
    except (LookupError, ValueError):
        pass
    hint = nearest(encoding, USUAL_ENCODINGS)
    raise DataError(f"unknown encoding {encoding!r} (--encoding).{hint} Any text encoding of Python will do")


def cookie(content: bytes) -> str | None:
    """The encoding that Python source names in a comment of its first two lines (PEP 263), None if it does not."""
    first, _, rest = content.partition(b"\n")
    match = CODING.match(first)
    if match is None and BLANK.match(first):
        match = CODING.match(rest.partition(b"\n")[0])
    return None if match is None else match[1].decode("ascii", "replace")


def marked(head: bytes) -> str | None:
    """The encoding that a byte order mark tells, None without one."""
    return next((encoding for mark, encoding in BYTE_ORDER_MARKS if head.startswith(mark)), None)


def wide(head: bytes) -> str | None:
    """The encoding that the beginning of a table without a byte order mark seems to be in, if each of its characters
    has two bytes: those of ASCII have a NUL. None for any other."""
    even, odd = (head[first::2].count(0) / max(1, len(head) // 2) for first in (0, 1))
    return "utf-16-le" if odd > 0.5 > 2 * even else "utf-16-be" if even > 0.5 > 2 * odd else None


def decode(content: bytes, encoding: str) -> bytes:
    """Bytes in another encoding as UTF-8 with MARKs, as a stream of them would come; the reference for `Transcoded`."""
    return content.decode(encoding, HANDLER).encode("utf-8", HANDLER)


def compression_of(file: str) -> str | None:
    """`gzip` or `zstd` by the ending of a name, None for a plain file."""
    return next((kind for suffix, kind in COMPRESSIONS.items() if file.lower().endswith(suffix)), None)


def open_bytes(place: Place, entry: Entry) -> BinaryIO:
    """A buffered stream of the file, decompressed if its name ends in .gz or .zst; one that is not can seek if the
    place can."""
    stream = place.open(entry)
    compression = compression_of(entry.file)
    if compression is None:
        return stream
    # A small buffer: a read that reaches the damaged place gives nothing of what lies before it.
    return buffered(_Decompressed(stream, compression))


def open_random(place: Place, entry: Entry) -> BinaryIO:
    """A stream of the file that can seek: a temporary copy where the place cannot."""
    stream = place.open(entry)
    if entry.seeks:
        return stream
    with stream:
        copy = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 (the caller closes it)
        shutil.copyfileobj(stream, copy, 1 << 20)
    copy.seek(0)
    return copy


def open_stream(place: Place, entry: Entry, encoding: str = UTF8) -> tuple[BinaryIO, str]:
    """A buffered stream of the file's text in UTF-8, and the encoding (a `codec` name) that the file is in.

    It can seek if the encoding is UTF-8, the file is not compressed and the place can. A mark of UTF-8 is passed on.
    """
    stream = open_bytes(place, entry)
    try:
        encoding = marked(cast(io.BufferedReader, stream).peek(4)) or encoding
    except DamagedStream:
        return stream, encoding  # whoever reads meets it again
    return (stream if encoding == UTF8 else buffered(Transcoded(stream, encoding))), encoding


def buffered(stream: io.RawIOBase) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(stream, buffer_size=BLOCK_BYTES))


class _Decompressed(io.RawIOBase):
    """The content of a compressed file; damage raises `DamagedStream`."""

    def __init__(self, stream: BinaryIO, compression: str) -> None:
        self._source, self._compression = stream, compression
        self._head = cast(io.BufferedReader, stream).peek(4)[:4]
        self._stream = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), compression)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._stream.read(len(buffer))
        except DAMAGES as error:
            words = damage(error)
            if not self._head.startswith(BEGINNINGS[self._compression]):
                raise DamagedStream(f"not {self._compression}, though its name says so ({words})") from None
            raise DamagedStream(f"damaged {self._compression} ({words})") from None
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._source.close()
        super().close()


class Transcoded(io.RawIOBase):
    """A stream of text in another encoding as UTF-8, with MARK for what cannot be decoded."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._source = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(HANDLER)
        self._held = memoryview(b"")
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held and not self._ended:
            block = cast(io.BufferedReader, self._source).read1(BLOCK_BYTES)
            self._ended = not block
            text = self._decoder.decode(block, final=self._ended)
            self._held = memoryview(text.encode("utf-8", HANDLER))
        length = min(len(buffer), len(self._held))
        buffer[:length] = self._held[:length]
        self._held = self._held[length:]
        return length

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()


def _mark(error: UnicodeError) -> tuple[str | bytes, int]:
    """Decoding: a lone surrogate for the bytes that are wrong. Encoding: MARK for any lone surrogate."""
    if isinstance(error, UnicodeDecodeError):
        return "\udcff", error.end
    if isinstance(error, UnicodeEncodeError):
        return MARK * (error.end - error.start), error.end
    raise error


HANDLER = "blues.mark"
codecs.register_error(HANDLER, _mark)


class Lines:
    """The lines of a binary stream, with `position` (bytes behind the last line) and `count`.

    A line over `limit` bytes is skipped without being held in memory and raises `LineTooLong`.
    """

    def __init__(self, stream: BinaryIO, start: int = 0, limit: int = MAX_DOCUMENT_BYTES) -> None:
        if start:
            stream.seek(start)
        self.stream, self.position, self.count, self.limit = stream, start, 0, limit

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> bytes:
        line = self.stream.readline(self.limit + 1)
        if not line:
            raise StopIteration
        self.position += len(line)
        self.count += 1
        if len(line) <= self.limit:
            return line
        while line and not line.endswith(b"\n"):
            line = self.stream.readline(BLOCK_BYTES)
            self.position += len(line)
        raise LineTooLong(longer_than(self.limit))
