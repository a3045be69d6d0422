"""What a run leaves behind to be read: one folder, JSON lines, append only.

    steps.jsonl        one record per optimizer step
    revisions.jsonl    one record per revised answer (text before and after)
    evaluations.jsonl  one record per validation
    views.jsonl        now and then one answer seen closely
    recipe.yaml        the settings (written by run.py)

`docs/run-folder.md` describes every key. Readers need nothing but these files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from redistill import ranks


class RunLog:
    """Appends records to the files of one run folder; a record is a flat mapping with its `step`. The first rank
    writes them.

    readers: whoever else wants each record when it is there: kind, record.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.readers: list[Callable[[str, dict[str, Any]], None]] = []
        self.folder.mkdir(parents=True, exist_ok=True)

    def append(self, kind: str, record: dict[str, Any]) -> None:
        """Add one line to `<kind>.jsonl`."""
        if not ranks.is_first():
            return
        with (self.folder / f"{kind}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        for reader in self.readers:
            reader(kind, record)

    def rewind(self, step: int) -> None:
        """Drop every record after `step`, which a resumed run writes again, and lines that are no records. All ranks
        go on when that is done."""
        ranks.on_first(lambda: self._rewind(step))

    def _rewind(self, step: int) -> None:
        for path in self.folder.glob("*.jsonl"):
            kept = [
                record for record in _parsed(path) if record is not None and record.get("step", 0) <= step
            ]
            write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of one file, oldest first; stops at a line that a kill cut short."""
    for record in _parsed(path):
        if record is None:
            return
        yield record


def _parsed(path: Path) -> Iterator[dict[str, Any] | None]:
    """Line by line; None for one that is no record. A file that is not there has no lines."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            yield record if isinstance(record, dict) else None


class Tail:
    """The records of a file that is still written to: each is handed out once, and a line once it is whole.

    broken: lines met so far that are no record.
    """

    def __init__(self, path: Path):
        self.path, self.broken = path, 0
        self._at, self._file = 0, 0

    def more(self) -> tuple[bool, Iterator[dict[str, Any]]]:
        """Whether the file began anew (what was handed out before no longer counts), and the records since the last
        call, to be taken before the next one. A file that is not there has none."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            found = None
        number, size = (found.st_ino, found.st_size) if found else (0, 0)
        anew = self._file != 0 and (number != self._file or size < self._at)
        if anew:
            self._at, self.broken = 0, 0
        self._file = number
        return anew, self._records() if size > self._at else iter(())

    def _records(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._at += len(line)
                try:
                    record = json.loads(line.decode("utf-8", "replace"))
                except ValueError:
                    record = None
                if isinstance(record, dict):
                    yield record
                else:
                    self.broken += 1


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Add lines to the end of `path`, made where there is none; a last line that a kill cut short is dropped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        kept = _whole_length(file)
        if kept < file.seek(0, os.SEEK_END):
            file.truncate(kept)
        file.write("".join(line + "\n" for line in lines).encode())


def _whole_length(file: IO[bytes]) -> int:
    """How many bytes up to and with the last line end."""
    at = file.seek(0, os.SEEK_END)
    while at > 0:
        start = max(at - 65536, 0)
        file.seek(start)
        found = file.read(at - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        at = start
    return 0


def write_whole(path: Path, text: str) -> None:
    """Replace `path` by `text` so that a reader, or a kill, never meets half of it."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def alone(lock: Path, *, busy: str | None = None) -> Iterator[None]:
    """Hold the file `lock`, so that one process at a time does what follows; a process that dies lets go of it.

    busy: what to say, as a ValueError, when another process holds it; None: wait for it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise ValueError(busy) from None
        yield
