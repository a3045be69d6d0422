"""The page served to this machine: one address, and no other page may call it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from redistill.play.page import Table, build, have_gradio, mounted

HOST = "127.0.0.1"
EVERY = ("0.0.0.0", "::")


class Serving:
    """A bound address; `run` serves until it is stopped, `stop` ends it from another thread."""

    def __init__(self, table: Table, host: str, bound: socket.socket) -> None:
        import uvicorn
        from starlette.middleware import Middleware

        self.bound, port = bound, bound.getsockname()[1]
        names = {f"{name}:{port}" for name in (host, "localhost")} if host not in EVERY else set()
        app = mounted(build(table), [Middleware(_OwnAddress, names=names)])
        quiet = {"log_level": "critical", "access_log": False, "timeout_graceful_shutdown": 1}
        self.server = uvicorn.Server(uvicorn.Config(app, **quiet))
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    def run(self) -> None:
        """Serve; Ctrl-C ends it."""
        self.server.run(sockets=[self.bound])

    def stop(self) -> None:
        """Let `run` return."""
        self.server.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """The address, taken before any model is read. port: 0 takes a free one.

    Errors: ValueError where gradio is missing, where the port is taken or not allowed, and for a strange host.
    """
    have_gradio()
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen()
    except OSError as problem:
        bound.close()
        if isinstance(problem, socket.gaierror) or problem.errno == errno.EADDRNOTAVAIL:
            raise ValueError(f"--host is {host}, which is no address of this machine.") from problem
        if problem.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise ValueError(
            f"port {port} cannot be had: choose another with --port, or 0 for any that is free."
        ) from problem
    return bound


class _OwnAddress:
    """Refuses a browser that was told another name than ours, and calls from pages of others; `names`: HOST:PORT, all
    if there are none."""

    def __init__(self, app: Callable[..., Awaitable[None]], names: set[str]) -> None:
        self._app, self._names = app, names

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not self._ours(dict(scope["headers"])):
            headers = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": b"This page is for its own address only.\n"})
            return
        await self._app(scope, receive, send)

    def _ours(self, headers: dict[bytes, bytes]) -> bool:
        host, origin = (headers.get(name, b"").decode("latin-1").lower() for name in (b"host", b"origin"))
        return not self._names or (host in self._names and (not origin or urlsplit(origin).netloc == host))
