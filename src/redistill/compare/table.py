"""The table of a comparison: what every method reached, what of it is certain, and what it cost."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from redistill.compare.plan import Plan
from redistill.compare.runs import Run
from redistill.evaluation.answers import prompt_scores
from redistill.evaluation.results import made_with
from redistill.evaluation.significance import Comparison, holm, needed, paired_bootstrap
from redistill.runlog import read, write_whole

LEVEL = 0.05
METRICS = (
    "rougeL_mean",
    "rougeL_greedy",
    "kl_to_teacher",
    "perplexity",
    "exact_match",
    "distinct_1",
    "distinct_2",
    "distinct_4",
    "self_repetition",
    "mean_tokens",
    "share_cut",
    "excess_error",
    "tokens_per_second",
)
LESS_IS_BETTER = ("kl_to_teacher", "perplexity")
TESTED = {"rougeL": "rougeL_mean", "kl": "kl_to_teacher"}


@dataclass(frozen=True)
class Line:
    """One method on one set. Figures as in `EvaluationRow`, the mean over training seeds; rougeL_std over those,
    or over sampling seeds where there is one. steps, train_seconds, peak_memory_bytes: mean, mean and most.
    rougeL_difference and its kin: against the baseline, per prompt; p after Holm over all lines of the table.
    rougeL_needs_prompts, rougeL_needs_seeds: how many times as many would tell the difference, see `needed`."""

    set: str
    method: str
    runs: int
    failed: int = 0
    rougeL_mean: float | None = None
    rougeL_std: float | None = None
    rougeL_greedy: float | None = None
    kl_to_teacher: float | None = None
    perplexity: float | None = None
    exact_match: float | None = None
    distinct_1: float | None = None
    distinct_2: float | None = None
    distinct_4: float | None = None
    self_repetition: float | None = None
    mean_tokens: float | None = None
    share_cut: float | None = None
    excess_error: float | None = None
    tokens_per_second: float | None = None
    steps: float | None = None
    train_seconds: float | None = None
    student_tokens: float | None = None
    peak_memory_bytes: int | None = None
    rougeL_difference: float | None = None
    rougeL_low: float | None = None
    rougeL_high: float | None = None
    rougeL_p: float | None = None
    rougeL_needs_prompts: float | None = None
    rougeL_needs_seeds: float | None = None
    kl_difference: float | None = None
    kl_low: float | None = None
    kl_high: float | None = None
    kl_p: float | None = None
    kl_needs_prompts: float | None = None
    kl_needs_seeds: float | None = None


def make_lines(plan: Plan, runs: Sequence[Run], output: Path) -> list[Line]:
    """Teacher and start first, then the methods as they were named, for each set."""
    before = _results(output / "before")
    lines = []
    for name in dict.fromkeys(_set(row) for row in before):
        teacher, start = [row for row in before if _set(row) == name]
        lines += [_line(name, "teacher", [teacher], []), _line(name, "start", [start], [])]
        for method in plan.comparison.methods:
            own = [run for run in runs if run.method == method]
            rows = [
                row
                for run in own
                if not run.failed
                for row in _results(run.folder / "evaluation")
                if _set(row) == name
            ]
            lines.append(_line(name, method, rows, own))
    return _tested(plan, runs, lines)


def _results(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]


def _set(row: dict[str, Any]) -> str:
    return row["set"] or ""


def _line(name: str, method: str, rows: Sequence[dict[str, Any]], runs: Sequence[Run]) -> Line:
    good = [run for run in runs if not run.failed]
    figures = {metric: _mean(row[metric] for row in rows) for metric in METRICS}
    means = [row["rougeL_mean"] for row in rows if row["rougeL_mean"] is not None]
    std = statistics.stdev(means) if len(means) > 1 else (rows[0]["rougeL_std"] if rows else None)
    return Line(
        name,
        method,
        len(rows),
        len(runs) - len(good),
        **figures,
        rougeL_std=std,
        steps=_mean(run.steps for run in good),
        train_seconds=_mean(run.train_seconds for run in good),
        student_tokens=_mean(run.student_tokens for run in good),
        peak_memory_bytes=max((run.peak_memory_bytes for run in good), default=None),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _tested(plan: Plan, runs: Sequence[Run], lines: list[Line]) -> list[Line]:
    """Every method against the baseline on every set; p-values corrected for their number, each metric apart."""
    for metric in TESTED:
        found: dict[int, Comparison] = {}
        for place, line in enumerate(lines):
            if line.method in ("teacher", "start", plan.baseline):
                continue
            pair = _pair(runs, line.method, plan.baseline, line.set, metric)
            if pair is not None:
                found[place] = paired_bootstrap(*pair)
        adjusted = holm([each.p_value for each in found.values()])
        for (place, each), p in zip(found.items(), adjusted, strict=True):
            more = needed(each) if p > LEVEL else None
            values = {
                "difference": each.difference,
                "low": each.low,
                "high": each.high,
                "p": p,
                "needs_prompts": more.prompts if more else None,
                "needs_seeds": more.seeds if more else None,
            }
            lines[place] = replace(
                lines[place], **{f"{metric}_{key}": value for key, value in values.items()}
            )
    return lines


def _pair(
    runs: Sequence[Run], method: str, baseline: str, name: str, metric: str
) -> tuple[list[list[float]], list[list[float]]] | None:
    """[training seeds, prompts] of both, over the seeds that both came to the end of."""
    by = {(run.method, run.seed): run.folder / "evaluation" / name for run in runs if not run.failed}
    seeds = [seed for m, seed in by if m == method and (baseline, seed) in by]
    if not seeds:
        return None
    one, other = ([_scores(by[who, seed], metric) for seed in seeds] for who in (method, baseline))
    return (one, other) if one[0] else None


def _scores(folder: Path, metric: str) -> list[float]:
    if metric == "rougeL":
        return prompt_scores(folder / "answers-student.jsonl")
    records = [r for r in read(folder / "references-student.jsonl") if r.get("kl") is not None]
    return [r["kl"] / r["tokens"] for r in sorted(records, key=lambda r: r["index"])]


def write_table(plan: Plan, lines: Sequence[Line], output: Path) -> None:
    """table.json, table.csv and table.md in `output`."""
    record = {
        "lines": [asdict(line) for line in lines],
        "baseline": plan.baseline,
        "comparisons_corrected_for": sum(line.rougeL_p is not None for line in lines),
        "level": LEVEL,
        "comparison": plan.comparison.model_dump(mode="json"),
        **made_with(),
    }
    write_whole(output / "table.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Line)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(line) for line in lines)
    write_whole(output / "table.csv", text.getvalue())
    write_whole(output / "table.md", to_markdown(plan, lines))


COLUMNS = (
    ("method", None, 0), ("ROUGE-L", "rougeL_mean", 2), ("greedy", "rougeL_greedy", 2), ("KL", "kl_to_teacher", 3),
    ("ppl", "perplexity", 1), ("exact", "exact_match", 1), ("dist-4", "distinct_4", 2), ("tokens", "mean_tokens", 0),
    ("steps", "steps", 0), ("minutes", "train_seconds", 1), ("GB", "peak_memory_bytes", 1),
)  # fmt: skip
SCALE = {"train_seconds": 60.0, "peak_memory_bytes": 1e9}
BOLD = ("rougeL_mean", "rougeL_greedy", "kl_to_teacher", "perplexity", "exact_match")


def cells(lines: Sequence[Line], line: Line) -> list[tuple[str, bool]]:
    """One row of the table as text, and which of it is the best among the methods of the set."""
    row = [(line.method + (f" ({line.failed} failed)" if line.failed else ""), False)]
    rivals = [other for other in lines if other.set == line.set and other.method not in ("teacher", "start")]
    for _, name, digits in COLUMNS[1:]:
        value = getattr(line, str(name))
        if value is None:
            row.append(("-", False))
            continue
        text = f"{value / SCALE.get(str(name), 1.0):.{digits}f}"
        if name == "rougeL_mean" and line.rougeL_std is not None:
            text += f" ± {line.rougeL_std:.2f}"
        known = [v for rival in rivals if (v := getattr(rival, str(name))) is not None]
        best = min(known, default=None) if name in LESS_IS_BETTER else max(known, default=None)
        row.append((text + _mark(line, str(name)), name in BOLD and line in rivals and value == best))
    return row


def _mark(line: Line, name: str) -> str:
    for metric, column in TESTED.items():
        p, difference = getattr(line, f"{metric}_p"), getattr(line, f"{metric}_difference")
        if column == name and p is not None and p <= LEVEL:
            return " ▲" if (difference > 0) == (metric == "rougeL") else " ▼"
    return ""


def notes(plan: Plan, lines: Sequence[Line]) -> str:
    """What the marks mean, and what the table cannot tell."""
    tested = [line for line in lines if line.rougeL_p is not None]
    text = (
        f"▲ better, ▼ worse than {plan.baseline} (paired bootstrap over prompts and training seeds, 5 %, Holm over "
        f"{len(tested)} comparisons); bold: best of the methods; ± over training seeds."
    )
    unclear = [line for line in tested if (line.rougeL_p or 0) > LEVEL and line.rougeL_needs_prompts]
    if unclear:
        nearest = min(unclear, key=lambda line: line.rougeL_needs_prompts or 0.0)
        text += (
            f" {len(unclear)} ROUGE-L differences are not significant; the nearest ({nearest.method}"
            f"{' on ' + nearest.set if nearest.set else ''}) would need about {nearest.rougeL_needs_prompts:.1f} "
            "times as many prompts."
        )
    if tested and len(plan.comparison.seeds) < 3:
        text += " Fewer than three training seeds say little about the spread between runs."
    return text


def to_markdown(plan: Plan, lines: Sequence[Line]) -> str:
    """One Markdown table for each set, and the notes."""
    parts = []
    for name in dict.fromkeys(line.set for line in lines):
        head = [column for column, _, _ in COLUMNS]
        parts.append(f"### {name}\n" if name else "")
        parts.append(f"| {' | '.join(head)} |\n| --- |{' ---: |' * (len(head) - 1)}")
        for line in (each for each in lines if each.set == name):
            row = [f"**{text}**" if best else text for text, best in cells(lines, line)]
            parts.append(f"| {' | '.join(row)} |")
        parts.append("")
    return "\n".join([*parts, notes(plan, lines), ""])


def to_tables(lines: Sequence[Line]) -> list[Table]:
    """Two tables for each set, for a terminal of 80 columns: how good, and at what cost."""
    made = []
    for name in dict.fromkeys(line.set for line in lines):
        for title, chosen in ((name or None, (0, 1, 2, 3, 4, 5)), (None, (0, 6, 7, 8, 9, 10))):
            table = Table(
                title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left"
            )
            for place in chosen:
                table.add_column(COLUMNS[place][0], justify="right" if place else "left", no_wrap=place > 0)
            for line in (each for each in lines if each.set == name):
                row = cells(lines, line)
                table.add_row(*(Text(row[p][0], style="bold" if row[p][1] else "") for p in chosen))
            made.append(table)
    return made
