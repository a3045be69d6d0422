"""Answers that a run has seen closely, cut into tokens; a record that does not fit together is passed over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from redistill.report.plain import cut, numbers, short, text, with_kl

FIGURES = (
    "kl",
    "lower",
    "upper",
    "divergence",
    "retained_mass",
    "retained_classes",
    "bucket_teacher",
    "bucket_student",
    "tail",
    "tail_teacher",
    "tail_student",
    "tail_kept",
)


class Views:
    """Takes in every record of views.jsonl. missing: why the run looked at no answer, if it said so."""

    def __init__(self) -> None:
        self._shown: list[dict[str, Any]] = []
        self.missing = ""

    @property
    def total(self) -> int:
        """How many there are."""
        return len(self._shown)

    def add(self, record: Mapping[str, Any]) -> None:
        """One more."""
        self.missing = text(record.get("missing")) or self.missing
        if (found := _shown(record)) is not None:
            self._shown.append(found)

    def data(self, most_bytes: int) -> dict[str, Any]:
        """`shown`, oldest first, of `total`: the newest that fit; and `missing`."""
        kept, size = [], 0
        for each in reversed(self._shown):
            size += len(json.dumps(each))
            if kept and size > most_bytes:
                break
            kept.append(each)
        return {"shown": kept[::-1], "total": len(self._shown), "missing": self.missing}


def _shown(record: Mapping[str, Any]) -> dict[str, Any] | None:
    tokens, step = cut(text(record.get("response")), record.get("ends")), record.get("step")
    if tokens is None or not isinstance(step, int):
        return None
    spans, gaps, positions = (record.get(key) for key in ("spans", "gaps", "positions"))
    whole = isinstance(spans, list) and isinstance(gaps, list) and len(spans) == len(gaps) == len(tokens)
    places = [_position(each, len(tokens)) for each in positions or () if isinstance(each, dict)]
    return {
        "step": step,
        "origin": text(record.get("origin")),
        "source": text(record.get("source")),
        "prompt": text(record.get("prompt")),
        "tokens": with_kl(tokens, numbers(record.get("kl"))),
        "spans": spans if whole else [],
        "gaps": [short(gap, 4) for gap in gaps] if whole and gaps else [],
        "vocabulary": record.get("vocabulary") if isinstance(record.get("vocabulary"), int) else None,
        "positions": [each for each in places if each is not None],
    }


def _position(record: Mapping[str, Any], length: int) -> dict[str, Any] | None:
    place, classes = record.get("position"), record.get("classes")
    if not isinstance(place, int) or not 0 <= place < length or not isinstance(classes, list):
        return None
    columns = {key: numbers(record.get(key)) for key in ("teacher", "student", "kept")}
    if len(columns["teacher"]) != len(classes) or len(columns["student"]) != len(classes):
        return None
    figures = {key: short(record.get(key)) for key in FIGURES}
    return {
        "position": place,
        "token": text(record.get("token")),
        "classes": [text(each) for each in classes],
        **figures,
        **columns,
    }
