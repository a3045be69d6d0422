"""The answers of several models to the same prompts, side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redistill.report.plain import short, text
from redistill.runlog import read


@dataclass(frozen=True)
class Column:
    """A model and the file of its answers. role: teacher, before or after (see `scores`)."""

    name: str
    role: str
    file: Path
    set: str = ""


def side_by_side(columns: Sequence[Column], most_bytes: int) -> dict[str, Any]:
    """`columns` in order, `prompts` ([text, references]), and `rows`: set, seed, place of the prompt, then one cell
    for each column, [answer, ROUGE-L, whether it is a reference], or None. `shown` of `total` rows: greedy answers
    first, then seed by seed, until the page has grown by `most_bytes`.
    """
    names = list(dict.fromkeys((column.name, column.role) for column in columns))
    rows: dict[tuple[str, str, int, str], list[Any]] = {}
    references: dict[str, list[str]] = {}
    for column in columns:
        place = names.index((column.name, column.role))
        for key, prompt, record in _answers(column):
            references.setdefault(prompt, _references(record))
            cells = rows.setdefault(key, [None] * len(names))
            exact = record.get("exact_match")
            cells[place] = [text(record.get("answer")), short(record.get("rougeL"), 4), exact is True]
    prompts: dict[str, int] = {}
    shown, size = [], 0
    for key in sorted(rows, key=_place):
        name, seed, index, prompt = key
        known = prompt in prompts
        row = [name, seed, index, prompts.setdefault(prompt, len(prompts)), rows[key]]
        size += len(json.dumps(row)) + (0 if known else len(json.dumps([prompt, references[prompt]])))
        if shown and size > most_bytes:
            break
        shown.append(row)
    used = {row[3] for row in shown}
    kept = [[prompt, references[prompt]] for prompt, place in prompts.items() if place in used]
    listed = [{"name": name, "role": role} for name, role in names]
    return {"columns": listed, "prompts": kept, "rows": shown, "total": len(rows)}


def _answers(column: Column) -> Iterable[tuple[tuple[str, str, int, str], str, dict[str, Any]]]:
    for record in read(column.file):
        if not isinstance(record, dict) or not isinstance(record.get("index"), int):
            continue
        prompt = text(record.get("prompt"))
        yield (column.set, str(record.get("seed")), record["index"], prompt), prompt, record


def _references(record: dict[str, Any]) -> list[str]:
    found = record.get("references")
    return [text(each) for each in found[:3]] if isinstance(found, list) else []


def _place(key: tuple[str, str, int, str]) -> tuple[bool, bool, int, str, str, int]:
    name, seed, index, _ = key
    return (seed != "greedy", not seed.isdigit(), int(seed) if seed.isdigit() else 0, seed, name, index)
