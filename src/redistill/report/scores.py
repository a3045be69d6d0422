"""The score table: rows of results.json (a run, an evaluation) and of table.json (a comparison) in one form.

A row's `role`: "teacher", "before" (the untrained student), "after" (a trained one), "method" (of a comparison). Its
`tests`: by figure, the change from the row it came from; `between`: from the first of several runs (`between.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from redistill.report.plain import number, short, text

Row = dict[str, Any]

FIGURES = (
    "parameters", "rougeL_greedy", "rougeL_mean", "rougeL_std", "kl_to_teacher", "perplexity", "tokens_per_second",
    "exact_match", "distinct_1", "distinct_2", "distinct_4", "self_repetition", "mean_tokens", "share_cut",
    "excess_error", "steps", "train_seconds", "peak_memory_bytes", "runs", "failed",
)  # fmt: skip
ROLES = {"teacher": "teacher", "student before": "before", "student after": "after", "start": "before"}
LEVEL = 0.05


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is none, or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return None


def run_rows(folder: Path, name: str, number_of_run: int | None) -> list[Row]:
    """The rows of a run's results.json, or of rows-before.json while it is not finished; of an evaluation too."""
    found = read_json(folder / "results.json")
    results: dict[str, Any] = found if isinstance(found, dict) else {}
    raw = results.get("rows", read_json(folder / "rows-before.json"))
    rows = [_row(each, name, number_of_run) for each in raw or () if isinstance(each, dict)]
    differences = results.get("differences")
    for each in differences if isinstance(differences, list) else ():
        for row in rows:
            if isinstance(each, dict) and row["name"] == each.get("of"):
                row["tests"][text(each.get("metric"))] = _test(each, text(each.get("against")))
    return rows


def table_rows(folder: Path) -> list[Row]:
    """The rows of a comparison's table.json, every method with its differences from the baseline."""
    found = read_json(folder / "table.json")
    table: dict[str, Any] = found if isinstance(found, dict) else {}
    baseline, rows = text(table.get("baseline")), []
    lines = table.get("lines")
    for line in lines if isinstance(lines, list) else ():
        if not isinstance(line, dict):
            continue
        row = _row({**line, "name": line.get("method")}, "", None)
        row["role"] = ROLES.get(row["name"], "method")
        row["baseline"] = row["name"] == baseline
        for metric, column in (("rougeL", "rougeL_mean"), ("exact", "exact_match"), ("kl", "kl_to_teacher")):
            values = {key: line.get(f"{metric}_{key}") for key in ("difference", "low", "high", "p")}
            if number(values["p"]) is not None:
                row["tests"][column] = _test(values, baseline)
        rows.append(row)
    return rows


def alike(rows: Sequence[Row]) -> list[Row]:
    """The rows without those of a further run that say of a teacher or a start what an earlier one says."""
    kept: list[Row] = []
    for row in rows:
        same = next(
            (each for each in kept if row["role"] in ("teacher", "before") and _same(each, row)), None
        )
        if same is None:
            kept.append(row)
        else:
            same["run"], same["of"] = None, ""
    return kept


def better(column: str, difference: float) -> bool:
    """Whether a rise of a figure is good news."""
    return (difference < 0) == (column in ("kl_to_teacher", "perplexity"))


def _same(one: Row, other: Row) -> bool:
    return all(one[key] == other[key] for key in ("name", "set", *FIGURES) if key != "tokens_per_second")


def _row(raw: Mapping[str, Any], of: str, number_of_run: int | None) -> Row:
    name = text(raw.get("name"))
    role = ROLES.get(name, "teacher" if name.endswith("(teacher)") else "after")
    figures = {key: short(raw.get(key), 6) for key in FIGURES}
    return {
        "name": name,
        "role": role,
        "run": number_of_run,
        "of": of,
        "set": text(raw.get("set")),
        **figures,
        "tests": {},
        "between": {},
    }


def _test(values: Mapping[str, Any], against: str) -> dict[str, Any]:
    numbers = {key: short(values.get(key)) for key in ("difference", "low", "high", "p", "prompts")}
    return {"against": against, **numbers}
