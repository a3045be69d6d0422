"""What a comparison came to, in numbers: what every method reached, what of it is certain, and what it cost."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from redistill.compare.plan import Plan
from redistill.compare.runs import Run
from redistill.compare.search import Found, shown
from redistill.evaluation.answers import prompt_scores
from redistill.evaluation.readings import reference_divergences
from redistill.evaluation.significance import Comparison, holm, needed, paired_bootstrap

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
TESTED = {"rougeL": "rougeL_mean", "kl": "kl_to_teacher", "exact": "exact_match"}


@dataclass(frozen=True)
class Line:
    """One method on one set. Figures as in `EvaluationRow`, the mean over training seeds; rougeL_std over those,
    or over sampling seeds where there is one. steps, train_seconds, peak_memory_bytes: mean, mean and most.
    trials, searched: how many settings were tried, and which was found, where there was a search.
    rougeL_difference and its kin: against the baseline, per prompt; p after Holm over all lines of the table.
    exact_..: in points of percent; None where neither of the two ever gave a reference word for word.
    rougeL_needs_prompts, rougeL_needs_seeds: how many times as many would tell the difference, see `needed`."""

    set: str
    method: str
    runs: int
    failed: int = 0
    trials: int | None = None
    searched: str | None = None
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
    exact_difference: float | None = None
    exact_low: float | None = None
    exact_high: float | None = None
    exact_p: float | None = None
    exact_needs_prompts: float | None = None
    exact_needs_seeds: float | None = None


def make_lines(plan: Plan, runs: Sequence[Run], output: Path, found: Mapping[str, Found]) -> list[Line]:
    """Teacher and start first, then the methods as they were named, for each set. found: of the search, if any."""
    before = _results(output / "before")
    lines = []
    for name in plan.request.sets or ("",):
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
            lines.append(_line(name, method, rows, own, found.get(method)))
    return _tested(plan, runs, lines)


def _results(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]


def _set(row: dict[str, Any]) -> str:
    return row["set"] or ""


def _line(
    name: str,
    method: str,
    rows: Sequence[dict[str, Any]],
    runs: Sequence[Run],
    found: Found | None = None,
) -> Line:
    good = [run for run in runs if not run.failed]
    figures = {metric: _mean(row[metric] for row in rows) for metric in METRICS}
    means = [row["rougeL_mean"] for row in rows if row["rougeL_mean"] is not None]
    std = statistics.stdev(means) if len(means) > 1 else (rows[0]["rougeL_std"] if rows else None)
    return Line(
        name,
        method,
        len(rows),
        len(runs) - len(good),
        len(found.trials) if found else None,
        shown(found.settings) if found and found.settings else None,
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
            more = needed(each, len(found)) if p > LEVEL else None
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
    """[training seeds, prompts] of both, over the seeds that both came to the end of; of two prompts or more."""
    by = {(run.method, run.seed): run.folder / "evaluation" / name for run in runs if not run.failed}
    seeds = [seed for m, seed in by if m == method and (baseline, seed) in by]
    if not seeds:
        return None
    one, other = ([_scores(by[who, seed], metric) for seed in seeds] for who in (method, baseline))
    told = metric != "exact" or any(map(any, [*one, *other]))
    return (one, other) if told and len(one[0]) > 1 else None


def _scores(folder: Path, metric: str) -> list[float]:
    answers = folder / "answers-student.jsonl"
    if metric == "rougeL":
        return prompt_scores(answers)
    if metric == "exact":
        return [100.0 * score for score in prompt_scores(answers, "exact_match")]
    return reference_divergences(folder / "references-student.jsonl")
