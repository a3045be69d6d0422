"""The tables: models beside each other, what they score and how they write; the positions of one response; the
phases of a training step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from redistill.console.plain import one_line
from redistill.evaluation.score import EvaluationRow

if TYPE_CHECKING:
    from redistill.evaluation.judge import Verdicts
    from redistill.evaluation.tasks import TaskScore
    from redistill.profiling import Profile


def evaluation_table(rows: Sequence[EvaluationRow]) -> Table:
    """One line per model: size, ROUGE-L, KL to the teacher, perplexity, speed; "-" is "not measured"."""
    table = frame(
        "parameters", "ROUGE-L\ngreedy", "ROUGE-L\nmean ± std", "KL to\nteacher", "perplexity", "tokens/s"
    )
    for row in rows:
        mean = _number(row.rougeL_mean, 2)
        table.add_row(
            Text(one_line(row.name)),
            count_text(row.parameters),
            _number(row.rougeL_greedy, 2),
            mean if row.rougeL_std is None else f"{mean} ± {row.rougeL_std:.2f}",
            _number(row.kl_to_teacher, 3),
            _number(row.perplexity, 1),
            _number(row.tokens_per_second, 0),
        )
    return table


def answers_table(rows: Sequence[EvaluationRow]) -> Table:
    """One line per model on how it writes: exact matches, variety, repetition, length, exposure bias."""
    table = frame(
        "exact\nmatch %", "distinct\n1 / 2 / 4", "repeats\nitself %", "tokens", "cut %", "ExAccErr\n%"
    )
    for row in rows:
        distinct = [_number(each, 2) for each in (row.distinct_1, row.distinct_2, row.distinct_4)]
        table.add_row(
            Text(one_line(row.name)),
            _number(row.exact_match, 1),
            " ".join(distinct),
            _percent(row.self_repetition),
            _number(row.mean_tokens, 1),
            _percent(row.share_cut),
            _number(row.excess_error, 1),
        )
    return table


def task_table(scores: Sequence[TaskScore]) -> Table:
    """One line per metric of a task, with its standard error and the number of records."""
    table = frame("metric", "value", "± error", "records", "shots")
    for score in scores:
        table.add_row(
            Text(one_line(score.task)),
            Text(one_line(score.metric)),
            _number(score.value, 4),
            _number(score.stderr, 4),
            str(score.samples),
            "-" if score.shots is None else str(score.shots),
        )
    return table


def judge_table(rows: Sequence[tuple[str, Verdicts]]) -> Table:
    """One line per set: how many of the first answers win, tie and lose; the difference per prompt, and the bias."""
    table = frame("wins", "ties", "losses", "wins less losses\n[95 %]", "p", "both orders\nagree %", "bias")
    for name, said in rows:
        table.add_row(
            Text(one_line(name)),
            str(said.wins),
            str(said.ties),
            str(said.losses),
            f"{said.difference:+.2f} [{said.low:+.2f}, {said.high:+.2f}]",
            _number(said.p_value, 3),
            _percent(said.agreement),
            f"{said.position_bias:+.2f}",
        )
    return table


def profile_table(profile: Profile) -> Table:
    """One line per phase of a step, and their sum: time, memory, arithmetic; "-" is "not known" and "none"."""
    table = frame(
        "seconds", "share %", "peak\nMB", "GFLOP", "GFLOP/s", "of the\nmatmul's %", "floor\nseconds"
    )
    for each in (*profile.phases, profile.whole):
        rate = profile.rate(each)
        seldom = f" (in {each.steps} of {profile.steps})" if each.steps < profile.steps else ""
        table.add_row(
            each.name + seldom,
            _number(each.seconds, 3),
            _percent(profile.share(each)),
            _number(None if each.peak_bytes is None else each.peak_bytes / 1e6, 0),
            _number(each.flops / 1e9 if each.flops else None, 2),
            _number(None if rate is None else rate / 1e9, 1),
            _percent(None if rate is None else rate / profile.matmul_rate),
            _number(profile.floor(each) if each.flops else None, 3),
        )
    return table


def frame(*headers: str) -> Table:
    """An empty table: a column for names and these for numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True, vertical="bottom")
    return table


def count_text(count: int) -> str:
    """134515008 -> "134.5M"."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        # 999,960 would round to 1000.0K.
        if count >= size * 0.99995:
            return f"{count / size:.1f}{letter}"
    return str(count)


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    if abs(value) >= 1e7:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return _number(None if share is None else 100 * share, 1)


def position_table(
    tokens: Sequence[str], kl: Sequence[float], teacher_tokens: Sequence[str], error: int | None
) -> Table:
    """Each position of a response: the student's token, the teacher's, the KL between them (nats, with a bar
    against the largest), and which one is corrected."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("student", overflow="fold")
    table.add_column("teacher", overflow="fold")
    table.add_column("KL", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    largest = max([value for value in kl if math.isfinite(value)], default=0.0)
    for place, (token, value, wanted) in enumerate(zip(tokens, kl, teacher_tokens, strict=True)):
        bar = "█" * round(20 * min(value / largest, 1.0)) if largest > 0 and value > 0 else ""
        table.add_row(
            str(place + 1),
            Text(_token(token)),
            Text(_token(wanted), style="dim" if wanted == token else "green"),
            f"{value:.2f}",
            f"{bar} ◀ error" if place == error else bar,
            style="bold red" if place == error else None,
        )
    return table


def _token(token: str) -> str:
    return one_line(token).replace(" ", "·")
