"""The file that kept pairs go to: one JSON object a line, as `redistill train` reads it."""

from __future__ import annotations

import errno
import json
import os
from io import FileIO
from pathlib import Path

from redistill.data import JSON_LINES
from redistill.records import Problem, to_example


def check_place(path: Path) -> None:
    """Errors: ValueError for a file that could not be read as a data set, or is none."""
    if path.suffix not in JSON_LINES:
        raise ValueError(f"--pairs is {path}: name a file that ends with {' or '.join(JSON_LINES)}.")
    if path.is_dir():
        raise ValueError(f"--pairs is {path}, which is a folder: name a file in it.")


def keep_pair(path: Path, prompt: str, answer: str, writer: str) -> int:
    """Add a record to the end of `path`, made where there is none; how many lines it has now.

    The line is there whole or not at all, and what was there before stays as it is: a last line without an end gets
    one first. Errors: ValueError for a pair that could not be trained on, and where the file cannot be written.
    """
    record = {"prompt": prompt, "completion": answer, "from": writer}
    found = to_example(record, "the pair")
    if isinstance(found, Problem):
        raise ValueError(f"{found.source} {found.what}: it was not saved.")
    line = json.dumps(record, ensure_ascii=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            _append(file, line.encode())
        with path.open("rb") as file:
            return sum(1 for _ in file)
    except OSError as problem:
        raise ValueError(
            f"{path} could not be written: {problem.strerror}; the pair was not saved."
        ) from problem


def _append(file: FileIO, line: bytes) -> None:
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(-1, os.SEEK_END)
        line = line if file.read(1) == b"\n" else b"\n" + line
    try:
        if (file.write(line) or 0) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError:
        file.truncate(size)
        raise
