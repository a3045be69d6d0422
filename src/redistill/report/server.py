"""The page live: a small server for this machine alone, which reads the folder and never writes to it."""

from __future__ import annotations

import errno
import hashlib
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from redistill.report.folder import watched
from redistill.report.page import Report, render, to_json

HOST = "127.0.0.1"
# A page is not made more often than this many times what making it takes: it must not slow the run down.
_REST = 10


class Newest:
    """What the page shows now; made anew only when a file has changed, by one request at a time."""

    def __init__(self, folders: Sequence[Path]):
        self._report, self._folders = Report(folders, waits=True), folders
        self._lock, self._ready = threading.Lock(), 0.0
        self._version, self._json, self._page = "", b"", ""

    def json(self) -> tuple[str, bytes]:
        """Its version and data."""
        with self._lock:
            self._refresh()
            return self._version, self._json

    def page(self) -> bytes:
        """The page with it."""
        with self._lock:
            self._refresh()
            return self._page.encode()

    def _refresh(self) -> None:
        started = time.monotonic()
        version = _version(self._folders)
        if self._json and (version == self._version or started < self._ready):
            return
        try:
            data = self._report.data()
        except OSError:
            # A file went away between being listed and being read; the next request looks again.
            if not self._json:
                raise
            return
        data["version"] = version
        self._version, self._json, self._page = version, to_json(data).encode(), render(data, live=True)
        self._ready = time.monotonic() + _REST * (time.monotonic() - started)


def _version(folders: Sequence[Path]) -> str:
    """Changes with any file that the page is made of."""
    found = hashlib.sha256()
    for path in watched(folders):
        try:
            seen = path.stat()
        except OSError:
            continue
        found.update(f"{path} {seen.st_size} {seen.st_mtime_ns} {seen.st_ino}\n".encode())
    return f'"{found.hexdigest()[:20]}"'


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, newest: Newest):
        self.newest = newest
        super().__init__((HOST, port), _Handler)

    @property
    def hosts(self) -> set[str]:
        """What a browser that was told our address calls us; another name is a page of someone else's."""
        port = self.server_address[1]
        return {f"{name}:{port}" for name in (HOST, "localhost")} | (
            {HOST, "localhost"} if port == 80 else set()
        )


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        if self.headers.get("Host", "").lower() not in self.server.hosts:
            self._answer(403, "text/plain", b"This page is for its own address only.\n")
        elif self.path in ("/", "/index.html"):
            self._answer(200, "text/html; charset=utf-8", self.server.newest.page())
        elif self.path == "/data.json":
            version, data = self.server.newest.json()
            same = self.headers.get("If-None-Match") == version
            self._answer(304 if same else 200, "application/json", b"" if same else data, version)
        else:
            self._answer(404, "text/plain", b"There is one page here: /\n")

    def _answer(self, status: int, kind: str, body: bytes, version: str = "") -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Frame-Options": "DENY",
        }
        for name, value in (headers | ({"ETag": version} if version else {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a request every two seconds is no news."""


def serve(folders: Sequence[Path], port: int) -> _Server:
    """A server that is bound, and serves once `serve_forever` is called. port: 0 takes a free one.

    Errors: ValueError where the port is taken or not allowed.
    """
    newest = Newest(folders)
    try:
        return _Server(port, newest)
    except OSError as problem:
        if problem.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise ValueError(
            f"port {port} cannot be had: choose another with --port, or 0 for any that is free."
        ) from problem
