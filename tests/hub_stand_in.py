"""A hub on this machine for tests: what the real client sends to make a repository and to commit files is kept."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OID = "0" * 39


@dataclass
class Hub:
    """url: what HF_ENDPOINT has to be. commits: (message, {path: content}) in order. asked: every request.
    refuse: a repository's name -> what a request about it must hold to be answered with 403."""

    url: str = ""
    created: list[dict] = field(default_factory=list)
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    refuse: dict[str, str] = field(default_factory=dict)

    def files(self) -> dict[str, bytes]:
        """The newest content of every path."""
        return {path: content for _, files in self.commits for path, content in files.items()}


def _answer(hub: Hub, path: str, body: bytes) -> dict | None:
    path = path.partition("?")[0]
    if path == "/api/repos/create":
        hub.created.append(json.loads(body))
        name = hub.created[-1]["name"]
        return {"url": f"{hub.url}/me/{name}", "name": f"me/{name}", "id": "1"}
    if path == "/api/validate-yaml":
        return {"errors": [], "warnings": []}
    if "/preupload/" in path:
        files = [file["path"] for file in json.loads(body)["files"]]
        return {"files": [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]}
    if "/commit/" in path:
        lines = [json.loads(line) for line in body.splitlines()]
        values = [line["value"] for line in lines if line["key"] == "file"]
        assert len(values) == len(lines) - 1
        files = {value["path"]: base64.b64decode(value["content"]) for value in values}
        hub.commits.append((lines[0]["value"]["summary"], files))
        oid = f"{OID}{len(hub.commits)}"
        return {"commitUrl": f"{hub.url}/me/x/commit/{oid}", "commitOid": oid}
    return None


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """A server of its own port, for as long as the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            hub.asked.append(f"{self.command} {self.path}")
            asked = self.path + body[:200].decode(errors="replace")
            refused = any(name in asked and part in self.path for name, part in hub.refuse.items())
            found = None if refused else _answer(hub, self.path, body)
            text = json.dumps(found if found is not None else {"error": "no"}).encode()
            self.send_response(403 if refused else 404 if found is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_HEAD = _do

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
