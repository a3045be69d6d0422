"""Exact answers by kind and exposure bias by length of a finished comparison, with intervals over training seeds.

    python benchmarks/testbed/curves.py OUTPUT testbed/data/test.jsonl [BASELINE]

An interval is mean ± t s / sqrt(n) with Student's t at 97.5 %, over the training seeds. Of the differences to
BASELINE (the comparison's own if left out), each seed against the same seed, those whose interval leaves out 0 are
marked; nothing is corrected for their number.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# Student's t at 97.5 % for n - 1 degrees of freedom, n from 2.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
LENGTHS = (8, 16, 24, 32, 40)
Figures = dict[str, float]
"""Name of a column -> its figure, of one run."""


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def exact(evaluation: Path, kinds: Sequence[str]) -> Figures:
    """Percent of exact sampled answers, by kind of instruction and in all."""
    of: dict[str, list[float]] = {kind: [] for kind in [*sorted(set(kinds)), "all"]}
    for record in read(evaluation / "answers-student.jsonl"):
        if record["seed"] != "greedy":
            for column in (kinds[record["index"]], "all"):
                of[column].append(100.0 * record["exact_match"])
    return {column: statistics.fmean(values) for column, values in of.items()}


def excess(evaluation: Path) -> Figures:
    """Excess accumulated error in percent, by length."""
    percent = json.loads((evaluation / "exposure-student.json").read_text(encoding="utf-8"))["percent"]
    return {f"{length} tokens": percent[length - 1] for length in LENGTHS if length <= len(percent)}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width; an endless one for a single value."""
    if len(values) < 2:
        return values[0], math.inf
    return statistics.fmean(values), T[min(len(values), 10) - 2] * statistics.stdev(values) / math.sqrt(
        len(values)
    )


def table(runs: Mapping[str, Mapping[int, Figures]], baseline: str) -> str:
    """One row a method: mean ± half width; ▲ where it is surely more than the baseline's, ▼ where less."""
    columns = list(next(iter(runs[baseline].values())))
    lines = [f"| method | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for method, by_seed in runs.items():
        row = []
        for column in columns:
            mean, half = interval([figures[column] for figures in by_seed.values() if column in figures])
            pairs = [(f, runs[baseline][s]) for s, f in by_seed.items() if s in runs[baseline]]
            more, wide = interval([a[column] - b[column] for a, b in pairs if column in a and column in b])
            mark = "" if abs(more) <= wide else (" ▲" if more > 0 else " ▼")
            row.append(f"{mean:.1f} ± {half:.1f}{mark}")
        lines.append(f"| {method} | {' | '.join(row)} |")
    return "\n".join(lines)


def gather(
    output: Path, methods: Sequence[str], measure: Callable[[Path], Figures]
) -> dict[str, dict[int, Figures]]:
    """Of every run that was measured: method -> training seed -> figures."""
    found: dict[str, dict[int, Figures]] = {}
    for method in methods:
        for folder in sorted((output / "runs" / method).glob("seed-*")):
            if (folder / "evaluation" / "results.json").is_file():
                found.setdefault(method, {})[int(folder.name[5:])] = measure(folder / "evaluation")
    return found


def main(arguments: Sequence[str]) -> None:
    output, kinds = Path(arguments[0]), [record["kind"] for record in read(Path(arguments[1]))]
    comparison = json.loads((output / "table.json").read_text(encoding="utf-8"))
    methods = comparison["comparison"]["methods"]
    baseline = arguments[2] if len(arguments) > 2 else comparison["baseline"]
    print(f"Exact answers, percent, by kind; marks: surely more ▲ or less ▼ than {baseline}\n")
    print(table(gather(output, methods, lambda folder: exact(folder, kinds)), baseline))
    print("\nExcess accumulated error, percent, up to a length; less is better\n")
    print(table(gather(output, methods, excess), baseline))


if __name__ == "__main__":
    main(sys.argv[1:])
