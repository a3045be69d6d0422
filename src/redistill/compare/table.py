"""The table of a comparison as files and for a terminal, with what its marks mean and what it cannot tell."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from redistill.compare.lines import LEVEL, TESTED, Line
from redistill.compare.plan import Plan
from redistill.compare.search import TRIAL_SEED, Found, shown
from redistill.runlog import write_whole
from redistill.versions import made_with

LESS_IS_BETTER = ("kl_to_teacher", "perplexity")
JUDGES = {"kl": "KL to the teacher on the references", "rougeL": "ROUGE-L of greedy answers"}


def write_table(
    plan: Plan,
    lines: Sequence[Line],
    output: Path,
    remarks: Sequence[Sequence[str]],
    more: Mapping[str, Any],
) -> None:
    """table.json, table.csv and table.md in `output`. remarks: texts under the table, each a first line and what it
    leads to, or nothing. more: what else goes into table.json."""
    record = {
        "lines": [asdict(line) for line in lines],
        "baseline": plan.baseline,
        "comparisons_corrected_for": sum(line.rougeL_p is not None for line in lines),
        "level": LEVEL,
        **more,
        "comparison": plan.comparison.model_dump(mode="json"),
        **made_with(),
    }
    write_whole(output / "table.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Line)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(line) for line in lines)
    write_whole(output / "table.csv", text.getvalue())
    write_whole(output / "table.md", to_markdown(plan, lines, remarks))


COLUMNS = (
    ("method", None, 0), ("ROUGE-L", "rougeL_mean", 2), ("greedy", "rougeL_greedy", 2), ("KL", "kl_to_teacher", 3),
    ("ppl", "perplexity", 1), ("exact", "exact_match", 1), ("dist-4", "distinct_4", 2), ("tokens", "mean_tokens", 0),
    ("steps", "steps", 0), ("minutes", "train_seconds", 1), ("GB", "peak_memory_bytes", 1),
)  # fmt: skip
SCALE = {"train_seconds": 60.0, "peak_memory_bytes": 1e9}
BOLD = ("rougeL_mean", "rougeL_greedy", "kl_to_teacher", "perplexity", "exact_match")


def cells(lines: Sequence[Line], line: Line) -> list[tuple[str, bool]]:
    """One row of the table as text, and which of it is the best among the methods of the set."""
    beside = [f"{line.failed} failed"] * bool(line.failed) + [f"{line.trials} trials"] * bool(line.trials)
    row = [(line.method + (f" ({', '.join(beside)})" if beside else ""), False)]
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
        all_alike = len(known) > 1 and min(known) == max(known)
        leads = value == best and not all_alike
        row.append((text + _mark(line, str(name)), name in BOLD and line in rivals and leads))
    return row


def _mark(line: Line, name: str) -> str:
    for metric, column in TESTED.items():
        p, difference = getattr(line, f"{metric}_p"), getattr(line, f"{metric}_difference")
        if column == name and p is not None and p <= LEVEL:
            return " ▲" if (difference > 0) == (column not in LESS_IS_BETTER) else " ▼"
    return ""


def notes(plan: Plan, lines: Sequence[Line]) -> str:
    """What the marks mean, and what the table cannot tell."""
    tested = [line for line in lines if line.rougeL_p is not None]
    repeated = any(line.runs > 1 for line in lines)
    if not tested and any(line.method not in ("teacher", "start", plan.baseline) for line in lines):
        return (
            f"Nothing was tested against {plan.baseline}: it takes two prompts, and a training seed under which both "
            f"came to their end. Measured in {plan.request.dtype}."
        )
    over = "training seeds, of teacher and start over sampling seeds" if repeated else "sampling seeds"
    text = (
        f"▲ better, ▼ worse than {plan.baseline} (paired bootstrap over prompts"
        f"{' and training seeds' if repeated else ''}, 5 %, Holm over {len(tested)} comparisons); bold: best of the "
        f"methods; ± over {over}; measured in {plan.request.dtype}."
    )
    unclear = [line for line in tested if (line.rougeL_p or 0) > LEVEL]
    if unclear:
        text += f" {len(unclear)} ROUGE-L differences are not significant; {_what_would_tell(unclear)}."
    if tested and len(plan.comparison.seeds) < 3:
        text += " Fewer than three training seeds say little about the spread between runs."
    return text


def _what_would_tell(unclear: Sequence[Line]) -> str:
    """By how much more of prompts or training seeds the nearest of these lines would be told."""
    amounts = [
        (times, what, f"{line.method} on {line.set}" if line.set else line.method)
        for line in unclear
        for what, times in (
            ("prompts", line.rougeL_needs_prompts),
            ("training seeds", line.rougeL_needs_seeds),
        )
        if times is not None
    ]
    if not amounts:
        return "no number of prompts alone would tell them, nor of training seeds"
    times, what, name = min(amounts)
    return f"the nearest ({name}) would need about {times:.1f} times as many {what}"


def search_notes(plan: Plan, found: Mapping[str, Found]) -> list[str]:
    """How the search was done, and of each method what it ended with; nothing without a search."""
    search = plan.comparison.search
    if search is None:
        return []
    text = [
        f"Search: at most {search.trials} trials of every method under the same budget, training seed {TRIAL_SEED}; "
        f"chosen by {JUDGES[search.by]}, on held-out data of the recipe."
    ]
    for method, each in found.items():
        bad = sum(trial.value is None for trial in each.trials)
        count = f"{len(each.trials)} of {each.grid} points tried" + (f", {bad} bad" if bad else "")
        if each.best is None:
            text.append(f"{method}: no setting ({count})")
        else:
            value = each.trials[each.best].value
            text.append(f"{method}: {shown(each.settings) or 'as it stands'} ({count}; {value:.4g})")
    return text


def to_markdown(plan: Plan, lines: Sequence[Line], remarks: Sequence[Sequence[str]]) -> str:
    """One Markdown table for each set, the notes and the remarks."""
    parts = []
    for name in dict.fromkeys(line.set for line in lines):
        head = [column for column, _, _ in COLUMNS]
        parts.append(f"### {name}\n" if name else "")
        parts.append(f"| {' | '.join(head)} |\n| --- |{' ---: |' * (len(head) - 1)}")
        for line in (each for each in lines if each.set == name):
            row = [f"**{text}**" if best else text for text, best in cells(lines, line)]
            parts.append(f"| {' | '.join(row)} |")
        parts.append("")
    parts += [notes(plan, lines), ""]
    for first, *rest in filter(None, remarks):
        parts += [first, "", *(f"- {line}" for line in rest), ""]
    return "\n".join(parts)


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
