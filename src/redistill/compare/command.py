"""What `redistill compare` does between its options and what it prints."""

from __future__ import annotations

from dataclasses import asdict
from itertools import chain
from pathlib import Path

from rich.console import Console

from redistill.compare.lines import make_lines
from redistill.compare.plan import read_plan
from redistill.compare.runs import begin, run_all
from redistill.compare.table import notes, search_notes, to_tables, write_table
from redistill.compare.trials import find_settings
from redistill.compare.verdicts import judge_methods, look_for_judge, verdict_notes
from redistill.runlog import alone


def compare(plan_file: Path, output: Path, console: Console, *, jobs: int | None = None) -> bool:
    """Every run of the comparison, and its table; whether none of them failed.

    jobs: runs at once; None: as many as the file says.
    """
    plan = read_plan(plan_file, jobs)
    for doubt in plan.warnings():
        console.print(f"warning: {doubt}", style="yellow", highlight=False)
    busy = f"another comparison is at work in {output}: wait for it, stop it, or choose another --output."
    with alone(output / ".lock", busy=busy):
        look_for_judge(plan, output)
        start = begin(plan, output, console)
        found = find_settings(plan, start, output, console)
        runs = run_all(plan, found, start, output, console)
    lines = make_lines(plan, runs, output, found)
    searched = {"search": {method: asdict(each) for method, each in found.items()}}
    remarks = [search_notes(plan, found)]
    write_table(plan, lines, output, remarks, {**searched, "judge": []})
    if plan.comparison.judge is not None:  # what the table says is there whatever becomes of the judge
        verdicts = judge_methods(plan, runs, output, console)
        remarks.append(verdict_notes(plan, verdicts))
        write_table(plan, lines, output, remarks, {**searched, "judge": [asdict(each) for each in verdicts]})
    for table in to_tables(lines):
        console.print()
        console.print(table)
    for text in (notes(plan, lines), *chain(*remarks)):
        console.print(text, highlight=False)
    console.print(f"The table lies in {output} (table.md, .csv, .json).", soft_wrap=True, highlight=False)
    return not any(run.failed for run in runs)
