"""The trials of a search: run like the comparison's own runs, judged on held-out data.

OUTPUT/search/METHOD/trial-N/     a run folder; its evaluation/ is on the recipe's held-out data
OUTPUT/search/METHOD/best.json    the best of them, noted when all have ended: from then on it stays
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from redistill.compare.plan import Plan
from redistill.compare.runs import Run, do_runs, keep_to, read_run, task_of
from redistill.compare.search import TRIAL_SEED, CompareSearch, Found, Point, Trial, shown
from redistill.runlog import write_whole

ROW = {"kl": "kl_to_teacher", "rougeL": "rougeL_greedy"}


def find_settings(plan: Plan, start: str, output: Path, console: Console) -> dict[str, Found]:
    """The search of every method, from trial to choice; nothing where the comparison has none.

    A trial that fails is a bad trial; until a method's choice is noted the next command tries it again.
    """
    search = plan.comparison.search
    if search is None:
        return {}
    points = {method: search.draw(method) for method in plan.comparison.methods}
    folders = {
        (method, n): output / "search" / method / f"trial-{n + 1}"
        for n in range(max(map(len, points.values())))
        for method in points
        if n < len(points[method])
    }
    keep_to(
        {
            folder: task_of(plan, method, TRIAL_SEED, start, output, points[method][n], plan.validation)
            for (method, n), folder in folders.items()
        }
    )
    planned = {
        f"{number}/{len(folders)}  {method}, trial {n + 1} ({shown(points[method][n])})": Run(
            method, TRIAL_SEED, folder
        )
        for number, ((method, n), folder) in enumerate(folders.items(), 1)
        if not _choice(output, method).is_file()
    }
    do_runs(planned, console, plan.comparison.jobs)
    return {method: _found(search, method, points[method], output) for method in points}


def _choice(output: Path, method: str) -> Path:
    return output / "search" / method / "best.json"


def _found(search: CompareSearch, method: str, points: Sequence[Point], output: Path) -> Found:
    path = _choice(output, method)
    trials = tuple(_trial(search, path.parent / f"trial-{n}", point) for n, point in enumerate(points, 1))
    if not path.is_file():
        sign = 1 if search.by == "kl" else -1
        values = {n: sign * trial.value for n, trial in enumerate(trials) if trial.value is not None}
        if not values:
            return Found(search.size(method), trials, None)
        best = min(values, key=values.__getitem__)
        write_whole(path, json.dumps({"trial": best + 1, "settings": trials[best].settings}, indent=1))
    best = json.loads(path.read_text(encoding="utf-8"))["trial"] - 1
    return Found(search.size(method), trials, best)


def _trial(search: CompareSearch, folder: Path, point: Point) -> Trial:
    run = read_run(folder)
    if run is None or run.failed:
        return Trial(point, None, run.failed if run else "its folder was removed")
    text = (folder / "evaluation" / "results.json").read_text(encoding="utf-8")
    return Trial(point, json.loads(text)["rows"][0][ROW[search.by]])
