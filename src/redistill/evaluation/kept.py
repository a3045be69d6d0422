"""A JSON-lines file that grows while a model is measured, and tells what it was made under.

A run that was killed goes on with what is missing. Beside `answers.jsonl` stands `answers.settings.json`; lines
made under other settings are never mixed with new ones.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from redistill.runlog import write_whole
from redistill.versions import made_with
from redistill.wrapped import local

if TYPE_CHECKING:
    from torch import nn

Settings = Mapping[str, Any]
OnOther = Literal["refuse", "anew"]
Record = dict[str, Any]
Key = Callable[[Record], Hashable]

_LOOKED_AT = 4096


class KeptLines:
    """The records of one file: those it holds already, and those appended.

    path: None keeps them in memory only. settings: what they are made under, plain JSON values. key: what tells
    one record from another. on_other: what to do with a file made under other settings, or of which that is
    not known: "refuse" (an hour of answers should not go because of a slip of the pen) or "anew" (the old
    lines are deleted).
    Errors: ValueError that names what differs.
    """

    def __init__(self, path: Path | None, settings: Settings, key: Key, *, on_other: OnOther = "refuse"):
        self.path, self.key, self.records = path, key, list[Record]()
        if path is not None:
            self._open(path, settings, on_other)
        self._held = {key(record) for record in self.records}

    def _open(self, path: Path, settings: Settings, on_other: OnOther) -> None:
        beside = settings_path(path)
        if path.is_file():
            if not (differing := _differing(beside, settings)):
                self.records = _whole_records(path)
                return
            if on_other == "refuse":
                raise ValueError(
                    f"{path} was made under other settings ({', '.join(differing)}): choose another --output, "
                    "repeat the command with its settings to go on with it, or delete what is there with --anew."
                )
            path.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        made = {"settings": dict(settings), **made_with()}
        write_whole(beside, json.dumps(made, ensure_ascii=False, indent=2) + "\n")

    def holds(self, keys: Iterable[Hashable]) -> bool:
        """Whether there is a record of every key."""
        return self._held.issuperset(keys)

    def append(self, records: Iterable[Record]) -> None:
        """Add those records that are not there yet; they are on the disk before this returns."""
        new = [record for record in records if self.key(record) not in self._held]
        self.records.extend(new)
        self._held.update(map(self.key, new))
        if self.path is not None and new:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_lines(new))
                file.flush()
                os.fsync(file.fileno())

    def sort(self, place: Callable[[Record], Any]) -> None:
        """Put the records in the order of `place`: how a file looks does not tell how often it was broken off."""
        ordered = sorted(self.records, key=place)
        if self.path is not None and ordered != self.records:
            write_whole(self.path, _lines(ordered))
        self.records = ordered


@dataclass(frozen=True)
class Keep:
    """What is kept of a model, or of a judge, on one set, and where; a path that is None keeps nothing.

    set, version, template: written beside the answers; a file made under others is not gone on with.
    answers, references, exposure, judgements: JSON lines, as `docs/run-folder.md` describes them.
    on_other: what to do with a file made under other settings, see `KeptLines`.
    """

    set: str | None = None
    version: str | None = None
    template: str | None = None
    answers: Path | None = None
    references: Path | None = None
    exposure: Path | None = None
    judgements: Path | None = None
    on_other: OnOther = "refuse"

    def lines(self, path: Path | None, key: Key, settings: Settings) -> KeptLines:
        """The lines at `path`, made on this set under `settings`."""
        mine = {"set": self.set, "version": self.version, "template": self.template}
        return KeptLines(path, {**mine, **settings}, key, on_other=self.on_other)


def settings_path(path: Path) -> Path:
    """answers.jsonl -> answers.settings.json"""
    return path.with_suffix(".settings.json")


def digest(values: Iterable[Any]) -> str:
    """Twelve digits of the SHA-256 of plain values: the same for the same prompts, answers or limits."""
    found = hashlib.sha256()
    for value in values:
        found.update(json.dumps(value, ensure_ascii=True).encode() + b"\n")
    return found.hexdigest()[:12]


def fingerprint(model: nn.Module) -> str:
    """Twelve digits that change with the model's class, its parameters' names and shapes, and their values.

    Of a parameter 4,096 values are looked at, evenly spread: any training step changes them, and 13B
    parameters are not read for it. The device does not matter, the number format does. Of sharded weights this rank's
    part is looked at, so that more ranks are another model.
    """
    found = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        values = local(parameter.detach()).reshape(-1)
        # A copy: memory that numpy has seen can no longer be given back, as FSDP2 does.
        seen = values[:: max(1, values.numel() // _LOOKED_AT)].float().cpu().clone()
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + seen.numpy().tobytes())
    return found.hexdigest()[:12]


def _differing(beside: Path, settings: Settings) -> list[str]:
    """The names of the settings that are not those in the file `beside`."""
    try:
        before = json.loads(beside.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return [f"there is no readable {beside.name}"]
    now = json.loads(json.dumps(dict(settings)))
    return [name for name in {**now, **before} if before.get(name) != now.get(name)]


def _whole_records(path: Path) -> list[Record]:
    """The records of `path`, up to the first line that a kill cut short; what follows is cut off the file."""
    records, end = [], 0
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            if not isinstance(record, dict):
                break
            records.append(record)
            end += len(line)
    if end < path.stat().st_size:
        os.truncate(path, end)
    return records


def _lines(records: Iterable[Record]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
