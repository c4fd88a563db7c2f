"""A web server on 127.0.0.1 for tests: files in memory, and every way in which a server may be less than helpful."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit


@dataclass
class Web:
    """files: content by path. etags, lengths, ranges: whether it tells or gives them. broken: answers that end early;
    failing: answers with status 500 before it works. asked: method, path, range and bytes sent of every request."""

    files: dict[str, bytes]
    etags: bool = True
    lengths: bool = True
    ranges: bool = True
    broken: int = 0
    failing: int = 0
    forbidden: tuple[str, ...] = ()
    asked: list[tuple[str, str, str | None, int]] = field(default_factory=list)
    url: str = ""

    def sent(self, path: str) -> int:
        """Bytes of a file that were sent."""
        return sum(size for method, asked, _, size in self.asked if method == "GET" and asked == path)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    web: Web
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        web, path = self.web, unquote(urlsplit(self.path).path)
        status, content, headers = 200, web.files.get(path), {}
        if path in web.forbidden:
            status, content = 403, b"no"
        elif body and web.failing:
            web.failing -= 1
            status, content = 500, b"later"
        elif content is None and path.endswith("/"):
            content, headers["Content-Type"] = self._listing(path), "text/html"
        elif content is None:
            status, content = 404, b"not here"
        elif web.etags:
            headers["ETag"] = f'"{hashlib.md5(content).hexdigest()}"'
        wanted = self.headers.get("Range")
        if status == 200 and web.ranges and wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            stop = min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(content)}"
            status, content = 206, content[int(first) : stop]
        self._send(status, headers, content if body else b"", len(content), path, wanted)

    def _send(self, status: int, headers: dict[str, str], content: bytes, length: int, path: str, wanted: str | None):
        web, ends_early = self.web, False
        if status in (200, 206) and web.broken and len(content) > 100_000:
            web.broken, ends_early, content = web.broken - 1, True, content[: len(content) // 2]
        web.asked.append((self.command, path, wanted, len(content)))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if web.lengths or status != 200:
            self.send_header("Content-Length", str(length))
        else:
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)
        if ends_early:
            self.close_connection = True

    def _listing(self, folder: str) -> bytes:
        names = {path.removeprefix(folder).partition("/") for path in self.web.files if path.startswith(folder)}
        links = sorted({quote(name + slash) for name, slash, _ in names})
        return "".join(f'<a href="{link}">x</a>\n' for link in ["../", "?C=N;O=D", *links]).encode()

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@contextmanager
def serve(files: dict[str, bytes], **options: object) -> Iterator[Web]:
    """The server while the block runs; `url` is its root without the closing slash."""
    web = Web(files, **options)  # type: ignore[arg-type]
    server = _Server(("127.0.0.1", 0), type("Bound", (Handler,), {"web": web}))
    web.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
