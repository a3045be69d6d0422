"""What `redistill compare` does between its options and what it prints."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from redistill.compare.plan import read_plan
from redistill.compare.runs import run_all
from redistill.compare.table import make_lines, notes, to_tables, write_table


def compare(plan_file: Path, output: Path, console: Console, *, jobs: int | None = None) -> bool:
    """Every run of the comparison, and its table; whether none of them failed.

    jobs: runs at once; None: as many as the file says.
    """
    plan = read_plan(plan_file, jobs)
    for doubt in plan.warnings():
        console.print(f"warning: {doubt}", style="yellow", highlight=False)
    runs = run_all(plan, output, console)
    lines = make_lines(plan, runs, output)
    write_table(plan, lines, output)
    for table in to_tables(lines):
        console.print()
        console.print(table)
    console.print(notes(plan, lines), highlight=False)
    console.print(f"The table lies in {output} (table.md, .csv, .json).", soft_wrap=True, highlight=False)
    return not any(run.failed for run in runs)
