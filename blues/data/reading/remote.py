"""Files at any URL that fsspec reads: https, s3, gs, abfs, sftp, zip within one of them, and so on.

In: a URL. Out: `RemoteFiles`, a `Place`. Credentials come from the environment or fsspec's own configuration; passwords
and queries of a URL are used but never told: not in manifests, not in messages.

Small files come in one request, of large ones only the ranges that are read. What the far side tells of a file's
content (entity tag, checksum, generation, time) stands for it, so that nothing is read only to be hashed; a file of
which it tells nothing is read once more. Broken connections are tried again.
"""

from __future__ import annotations

import errno
import io
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit

import xxhash

from blues.data.reading.places import (
    LINK,
    READ_BYTES,
    Choose,
    Entry,
    Listing,
    Place,
    hidden_below,
    in_order,
    passes_over,
)
from blues.errors import DataError

ONE_REQUEST_BYTES = 4 << 20
"""Files up to this size are read whole."""
BLOCK_BYTES = 2 << 20
CUT_ABOVE = 16 << 20
"""Files up to this size are never cut: cutting CSV, JSON Lines and text means reading the file once more."""
DELAYS_S = (0.5, 2.0)
"""Waited before the second and the third try."""
THREADS = 16
DEEPEST = 32
"""Folders within folders; pages of a web server can link in circles."""
SILENCE_S = 60.0
IDENTITIES = (
    *("ETag", "etag", "e_tag", "Content-MD5", "content_md5", "md5Hash", "md5", "Digest", "sha256", "sha", "blob_id"),
    *("CRC", "crc32c", "checksum", "generation", "version_id", "VersionId"),
)
"""What file systems say of a content, surest first."""
TIMES = ("Last-Modified", "LastModified", "last_modified", "mtime", "modified", "updated", "created", "date_time")

Made = TypeVar("Made")


@dataclass(frozen=True)
class RemoteFiles(Place):
    """The files below a URL, or the one file there."""

    url: str = field(repr=False)  # may hold a password

    @property
    def threads(self) -> int:
        return THREADS if self._system().async_impl else 1

    @property
    def name(self) -> str:
        """What the source is called: the last name in the URL."""
        for link in self.url.split("::"):
            path = urlsplit(link).path if link.startswith("http") else link.partition("://")[2] or link
            last = unquote(path.rstrip("/").rpartition("/")[2])
            if last and "://" in link:
                return _text(last)
        return _text(unquote(urlsplit(self.url.rpartition("::")[2]).netloc)) or "remote"

    def is_file(self, choose: Choose) -> bool:
        """Whether the URL is that of a file. A web server does not say: there it is what `choose` lets through by its
        name, or has no links.

        Raises:
            DataError: nothing is there, or it cannot be reached.
        """
        with self._reaching("", DataError):
            system, root = self._connect()
            if _is_http(system):
                path = urlsplit(root).path
                return not path.endswith("/") and (choose(_name(root)) is None or not system.ls(root, detail=False))
            return root.strip("/") != "" and system.info(root)["type"] != "directory"

    def entry(self) -> Entry:
        """The one file at the URL."""
        _, root = self._connect()
        return Entry(self.name, root, -1, "")

    def entries(self, choose: Choose, ignored: Counter[str]) -> Listing:
        with self._reaching("", DataError):
            system, root = self._connect()
            system.invalidate_cache()  # what it listed for an earlier plan
            listed = self._walk(system, root) if _walks(system) else _again(lambda: system.find(root, detail=True))
        found: list[Entry] = []
        for path, info in listed.items():
            if _is_http(system):
                if urlsplit(path).path.endswith("/"):  # another order of the same listing
                    continue
                file = unquote(urlsplit(path).path.removeprefix(urlsplit(root).path)).lstrip("/")
            else:
                file = path.removeprefix(root.rstrip("/")).lstrip("/")
            if hidden_below(file):
                continue
            other = info.get("islink") or info.get("type") not in ("file", None)
            reason = LINK if other else choose(file.rpartition("/")[2])
            if reason is not None:
                ignored[_text(reason)] += 1
            else:
                size = info.get("size")
                found.append(Entry(_text(file), path, -1 if size is None else size, _first(_stamps(info, IDENTITIES))))
        return in_order(Listing.of(found))

    def _walk(self, system: Any, root: str) -> dict[str, dict[str, Any]]:
        """Every file below a folder with what is known of it. (fsspec's own walk leaves out what it fails to list.)"""
        files: dict[str, dict[str, Any]] = {}
        level = [root]
        for _ in range(DEEPEST):
            with ThreadPoolExecutor(self.threads) as pool:
                listings = list(pool.map(lambda folder: _again(lambda: system.ls(folder, detail=True)), level))
            infos = {info["name"]: info for listing in listings for info in listing}
            files |= {path: info for path, info in infos.items() if info["type"] != "directory"}
            level = [path for path, info in infos.items() if info["type"] == "directory" and not _is_left_out(path)]
            if not level:
                return files
        raise DataError(f"{self.where('')} has folders {DEEPEST} levels deep; do they contain themselves?")

    def resolve(self, entry: Entry) -> Entry:
        """Ask for what the listing did not say; read the file where asking does not help either."""
        size, stamp = entry.size, entry.stamp
        if size < 0 or not stamp:
            info = self._info(entry)
            size, stamp = (-1 if info.get("size") is None else info["size"]), _first(_stamps(info))
        known, digest = size >= 0, xxhash.xxh3_128()
        if not known or not stamp:
            size = 0
            with io.BufferedReader(_Stream(self, Entry(entry.file, entry.path, -1, "", False)), BLOCK_BYTES) as stream:
                while block := stream.read(READ_BYTES):
                    size += len(block)
                    digest.update(block)
            stamp = f"xxh3:{digest.hexdigest()}"
        seeks = size <= ONE_REQUEST_BYTES or (known and self._has_ranges(entry, size))
        return Entry(entry.file, entry.path, size, stamp, seeks)

    def content(self, entry: Entry) -> str:
        if entry.stamp.startswith("xxh3:"):
            return entry.stamp
        about = "\0".join((redact(entry.path), str(entry.size), entry.stamp))
        return f"remote:{xxhash.xxh3_128_hexdigest(about.encode('utf-8', 'replace'))}"

    def open(self, entry: Entry) -> BinaryIO:
        if not 0 <= entry.size <= ONE_REQUEST_BYTES:
            return io.BufferedReader(_Stream(self, entry), BLOCK_BYTES)
        with self._reaching(entry.file):
            content = _again(lambda: self._system().cat_file(entry.path))
        if len(content) != entry.size:
            raise OSError(errno.EIO, f"{len(content):,} bytes came of {entry.size:,}; it may have changed")
        return io.BufferedReader(io.BytesIO(content))

    def check(self, entry: Entry) -> None:
        info = self._info(entry)
        size = entry.size if info.get("size") is None else info["size"]
        name = entry.stamp.partition(":")[0]
        if size != entry.size or _stamps(info).get(name, entry.stamp) != entry.stamp:
            raise DataError(f"{self.where(entry.file)} changed while it was being prepared; run the command again")

    def where(self, file: str) -> str:
        url = redact(self.url)
        first, chain, rest = url.partition("::")
        inside = file if file and file != self.name else ""
        return repr(f"{first.rstrip('/')}/{inside}{chain}{rest}" if inside else url)

    def cut_above(self, total: int) -> int:
        return max(CUT_ABOVE, total // (4 * THREADS))

    def provenance(self) -> dict[str, Any]:
        return {"kind": "remote", "url": "::".join(_link(link) for link in redact(self.url).split("::"))}

    def stream(self, entry: Entry) -> BinaryIO:
        """What fsspec opens. Without ranges, a web server's file is one long answer."""
        system = self._system()
        if not _is_http(system):
            return system.open(entry.path, "rb", block_size=BLOCK_BYTES, cache_type="none")
        if not entry.seeks:
            return system.open(entry.path, "rb", block_size=0)
        return system.open(entry.path, "rb", block_size=BLOCK_BYTES, cache_type="none", size=entry.size)

    def _has_ranges(self, entry: Entry, size: int) -> bool:
        """Whether the end of the file can be read without the rest."""
        from fsspec.archive import AbstractArchiveFileSystem

        if isinstance(self._system(), AbstractArchiveFileSystem):
            return False  # it would unpack all that lies before
        try:
            with self.stream(Entry(entry.file, entry.path, size, "", True)) as stream:
                stream.seek(size - 1)
                return len(stream.read(1)) == 1
        except Exception:  # each file system has its own way to say no
            return False

    def _info(self, entry: Entry) -> dict[str, Any]:
        with self._reaching(entry.file):
            system = self._system()
            system.invalidate_cache(entry.path)
            return _again(lambda: system.info(entry.path))

    def _system(self) -> Any:
        return self._connect()[0]

    def _connect(self) -> tuple[Any, str]:
        """The file system, and where in it the URL is.

        Raises:
            DataError: an unknown kind of URL, or one that needs a package that is not there.
        """
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.url, **_patience(self.url))
        except ImportError as error:
            raise DataError(f"{self.where('')} needs a package that is not installed: {redact(str(error))}") from None
        except ValueError as error:
            raise DataError(f"{self.where('')} is no URL that can be read: {redact(str(error))}") from None

    @contextmanager
    def _reaching(self, file: str, kind: type[DataError] | None = None) -> Iterator[None]:
        """Every error of every file system as an OSError with a message without secrets, or as a `kind`."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            problem = _problem(error)
            if kind is not None:
                raise kind(f"cannot read {self.where(file)}: {problem.strerror}") from None
            raise problem from None


class _Stream(io.RawIOBase):
    """A remote file from any position on. A connection that breaks is made again where it broke."""

    def __init__(self, place: RemoteFiles, entry: Entry) -> None:
        self._place, self._entry = place, entry
        self._stream: BinaryIO | None = None
        self._position = self._reached = 0  # where to read next; where the open stream stands

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._entry.seeks

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if not self._entry.seeks:
            raise io.UnsupportedOperation("a file without ranges is read from its beginning")
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._entry.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position == self._entry.size:
            return 0
        with self._place._reaching(self._entry.file):
            content = _again(lambda: self._read(len(buffer)))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def _read(self, length: int) -> bytes:
        try:
            if self._stream is None:
                self._stream, self._reached = self._place.stream(self._entry), 0
            if self._reached != self._position:
                self._go_on(self._stream)
            content = self._stream.read(length)
            self._reached += len(content)
            if not content and self._position < self._entry.size:
                raise OSError(errno.EIO, f"it ended after {self._position:,} of {self._entry.size:,} bytes")
            return content
        except Exception:
            self._stream = None
            raise

    def _go_on(self, stream: BinaryIO) -> None:
        if self._entry.seeks:
            stream.seek(self._position)
            self._reached = self._position
        while self._reached < self._position:
            skipped = stream.read(min(BLOCK_BYTES, self._position - self._reached))
            if not skipped:
                raise OSError(errno.EIO, "it ended earlier than before")
            self._reached += len(skipped)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        super().close()


def redact(text: str) -> str:
    """A text without what URLs in it keep secret: users, passwords and queries (signatures, tokens)."""
    text = re.sub(r"([A-Za-z][\w+.-]*://)[^/\s'\"@]*@", r"\1", text)
    return re.sub(r"([A-Za-z][\w+.-]*://[^\s'\"?]*)\?[^\s'\":]*", r"\1", text)


def _again(function: Callable[[], Made]) -> Made:
    """The result of a request, tried once more after each of DELAYS_S unless it is refused for good."""
    for delay in DELAYS_S:
        try:
            return function()
        except (FileNotFoundError, PermissionError, DataError):
            raise
        except Exception as error:
            if _status(error) in (401, 403, 404, 410):
                raise
            time.sleep(delay)
    return function()


def _status(error: BaseException) -> int:
    """The status of a web server's answer, 0 if the error is of another kind."""
    return getattr(error, "status", 0) or 0


def _problem(error: Exception) -> OSError:
    cause = error.__cause__ or error  # fsspec tells of every failure of a web server as of a missing file
    words = redact(" ".join(str(cause).split())) or type(cause).__name__
    if isinstance(cause, PermissionError) or _status(cause) in (401, 403):
        hint = "credentials come from the environment or from fsspec's configuration"
        return PermissionError(errno.EACCES, f"access denied ({words}); {hint}")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "nothing is there" + ("" if cause is error else f" ({words})"))
    return OSError(errno.EIO, words)


def _stamps(info: Mapping[str, Any], names: Sequence[str] = IDENTITIES + TIMES) -> dict[str, str]:
    """What says that a content is the same, surest first, by the names of what says it."""
    stamps: dict[str, str] = {}
    for name in names:
        if info.get(name) not in (None, ""):
            plain = name.lower().replace("-", "_")
            value = str(info[name]).removeprefix("W/").strip('"')  # listings and files quote them differently
            stamps.setdefault(plain, f"{plain}:{value}")
    return stamps


def _patience(url: str) -> dict[str, Any]:
    """Options for web servers: an answer may take as long as it needs, but not fall silent."""
    import aiohttp
    import fsspec.config

    options: dict[str, Any] = {}
    for scheme in ("http", "https"):
        if f"{scheme}://" in url:
            client = dict(fsspec.config.conf.get(scheme, {}).get("client_kwargs", {}))
            client.setdefault("timeout", aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S))
            options[scheme] = {"client_kwargs": client}
    return options


def _walks(system: Any) -> bool:
    """Whether it finds files by listing one folder after the other. Object stores list them all at a time."""
    from fsspec.asyn import AsyncFileSystem
    from fsspec.spec import AbstractFileSystem

    if isinstance(system, AsyncFileSystem):
        return type(system)._find is AsyncFileSystem._find
    return type(system).find is AbstractFileSystem.find


def _is_left_out(folder: str) -> bool:
    return passes_over(unquote(folder.rstrip("/").rpartition("/")[2]))


def _first(stamps: Mapping[str, str]) -> str:
    return next(iter(stamps.values()), "")


def _is_http(system: Any) -> bool:
    return "http" in system.protocol


def _name(url: str) -> str:
    return unquote(urlsplit(url).path.rpartition("/")[2])


def _text(name: str) -> str:
    """A name as valid Unicode."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _link(link: str) -> str:
    """A link of a chained URL, of which a path on this machine is not told."""
    scheme, there, path = link.partition("://")
    if there and scheme not in ("file", "local"):
        return link
    return os.path.basename(path if there else link)
