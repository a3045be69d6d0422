"""Processes of the command line that are there at once: torch is imported by one parent, and each is a fork of it.

The parent never computes, so that its children start without threads; a child is a process like any other, with its
own memory, files and signals.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

STREAMS = "stdout", "stderr"


class Life:
    """One process: `redistill` with its arguments, its output in files."""

    def __init__(self, pid: int, folder: Path, pipe: IO[str]):
        self.pid, self._folder, self._pipe = pid, folder, pipe
        self._code: int | None = None

    def said(self) -> str:
        return "".join(map(self.text, STREAMS))

    def text(self, stream: str) -> str:
        """What it wrote to "stdout" or "stderr"."""
        return (self._folder / f".{stream}.txt").read_text(encoding="utf-8", errors="replace")

    def ended(self, seconds: float = 0.0) -> bool:
        """Whether it is over, or is within so many seconds."""
        if self._code is None and select.select([self._pipe], [], [], seconds)[0]:
            self._code = int(self._pipe.readline())
        return self._code is not None

    def send(self, number: int) -> None:
        """A signal, unless the process has ended."""
        if not self.ended():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, seconds: float = 1200.0) -> int:
        """The exit code, negative for a signal. A process that hangs is killed, and is an error."""
        if not self.ended(seconds):
            self.send(signal.SIGKILL)
            raise AssertionError(f"still there after {seconds} seconds:\n{self.said()}")
        assert self._code is not None
        return self._code


class Lives:
    """The parent, and the processes it makes: one at a time."""

    def __enter__(self) -> Lives:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self._parent = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment,
        )  # fmt: skip
        assert self._out.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self._in.close()
        self._parent.wait(timeout=60)
        self._out.close()

    @property
    def _in(self) -> IO[str]:
        assert self._parent.stdin is not None
        return self._parent.stdin

    @property
    def _out(self) -> IO[str]:
        assert self._parent.stdout is not None
        return self._parent.stdout

    def train(
        self,
        run: str,
        folder: Path,
        settings: Mapping[str, Any] = MappingProxyType({}),
        *more: str,
        first: str = "",
    ) -> Life:
        """`redistill train` of the recipe in `folder` under other settings and `more` options, into `folder`/RUN."""
        sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        return self.start(["train", "recipe.yaml", "--output", run, *more, *sets], folder, first=first)

    def start(self, args: Sequence[Any], folder: Path, *, first: str = "") -> Life:
        """`redistill ARGS` in `folder`. first: code that the process runs before."""
        asked = {"args": list(map(str, args)), "folder": str(folder), "first": first}
        self._in.write(json.dumps(asked) + "\n")
        return Life(int(self._out.readline()), folder, self._out)


def _live(asked: dict[str, Any]) -> int:
    """In the child: what the console script does."""
    from redistill.cli import main

    os.chdir(asked["folder"])
    for number, stream in enumerate(STREAMS, start=1):
        os.dup2(os.open(f".{stream}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["redistill", *asked["args"]]
    try:
        exec(asked["first"], {})
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        return 99
    return 0


def _parent() -> None:
    import redistill.cli.training
    import redistill.commands
    import redistill.run  # noqa: F401

    print("ready", flush=True)
    while line := sys.stdin.readline():
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 99
            try:
                code = _live(asked)
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _parent()
