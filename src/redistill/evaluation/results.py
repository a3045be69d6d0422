"""results.json: the rows of a table beside the sets, versions, seeds, seconds and peak memory."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from redistill.evaluation.score import EvaluationRow
from redistill.runlog import write_whole
from redistill.versions import made_with


@dataclass(frozen=True)
class SetRecord:
    """A set that was measured on. version: of its text (`suites.version_of`). source: file, folder or hub id."""

    name: str
    version: str
    records: int
    source: str


def write_results(
    path: Path,
    rows: Sequence[EvaluationRow],
    *,
    seeds: Sequence[int],
    seconds: float,
    peak_memory_bytes: int,
    sets: Sequence[SetRecord] = (),
    template: str | None = None,
    differences: Sequence[Mapping[str, Any]] = (),
    **settings: Any,
) -> None:
    """Replace `path` by the table as JSON: `rows` (see `EvaluationRow`) beside what they were made with.

    differences: between rows, see `gains.Gain`.

    seconds: of the whole run. template: how prompts were written. settings: whatever else the rows were made
        with, plain JSON values, under that key. `made_with()` is written too. A row's number that is not
        finite becomes null.
    """
    record = {
        "rows": [_finite(asdict(row)) for row in rows],
        "differences": [dict(each) for each in differences],
        "sets": [asdict(each) for each in sets],
        "template": template,
        "seeds": list(seeds),
        **made_with(),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes,
        "settings": settings,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }


def peak_memory_bytes() -> int:
    """The most memory this process has held so far, a GPU's not counted; 0 on Windows, which tells none."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
