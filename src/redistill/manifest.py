"""Whether a folder is as it was written: the SHA-256 of each of its files, in the form that `sha256sum` reads.

Against disks that lie and copies that break off, not against people: who can change a file can change its hash.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def write_manifest(folder: Path) -> None:
    """Hash every file in `folder` into its `SHA256SUMS`. `sha256sum -c SHA256SUMS` there checks it too."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    lines = [f"{_hash(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / NAME).write_text("".join(lines), encoding="utf-8")


def damaged_files(folder: Path) -> list[str]:
    """The files of `folder` that are not what its manifest says, by name; [] where all are.

    A manifest that is missing, or cannot be read, is damaged itself. Files that it does not name are not looked at,
    nor is its own line, which `sha256sum * > SHA256SUMS` gives it.
    """
    try:
        lines = (folder / NAME).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return [NAME]
    found = [_LINE.fullmatch(line) for line in lines]
    if not found or None in found:
        return [NAME]
    named = {line[2]: line[1] for line in found if line is not None and line[2] != NAME}
    return [name for name, sha256 in named.items() if _hash(folder / name) != sha256]


def _hash(path: Path) -> str:
    """The SHA-256 of a file; "" for one that cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):  # a flipped bit may have made a name that no file can have
        return ""
