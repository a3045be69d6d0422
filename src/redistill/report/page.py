"""The page: all that was read as one JSON block inside one HTML file that asks nothing of any network."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from redistill.report import verdict
from redistill.report.answers import Column, side_by_side
from redistill.report.between import Kept, tell_apart
from redistill.report.curves import PANELS, curves, spent
from redistill.report.drawing import asset, script_of, style_of
from redistill.report.folder import Kind, Run, answer_columns, kind_of, runs_in
from redistill.report.plain import text
from redistill.report.scores import Row, alike, run_rows, table_rows

SCRIPTS = (
    "text",
    "state",
    "scales",
    "chart",
    "overview",
    "curves",
    "pen",
    "revisions",
    "views",
    "answers",
    "page",
)
STYLES = ("colours", "page", "marks", "sections")
# What a page holds at most, whatever the number of runs: together under 6 MB.
ANSWERS_BYTES, VIEWS_BYTES, REVISIONS, POINTS = 1_400_000, 900_000, 240, 1000


class Drawn(NamedTuple):
    """What the page draws as one: a run, or a method of a comparison with its runs, seed by seed."""

    name: str
    runs: Sequence[Run]

    @property
    def first(self) -> Run:
        """Whose revisions, close views and settings stand for all."""
        return self.runs[0]


class Report:
    """Some folders as the data of a page, read anew at each call; what was read of a growing file stays read.

    Errors: ValueError for a path that is no folder, unless `waits`: then it is a run that has not begun.
    """

    def __init__(self, folders: Sequence[Path], *, waits: bool = False) -> None:
        for folder in folders:
            if not folder.is_dir() and not (waits and not folder.exists()):
                raise ValueError(
                    f"{folder} is no folder: give the run folder that `redistill train --output` wrote."
                )
        self.folders = [Path(folder) for folder in folders]
        self._runs: dict[tuple[Path, bool], Run] = {}

    def data(self) -> dict[str, Any]:
        """What the page shows, as plain JSON values; `docs/report.md` says what is thinned and how."""
        kinds: list[Kind] = [kind_of(folder) for folder in self.folders]
        names = _names(self.folders)
        listed = _listed(self.folders, kinds, names)
        drawn = [Drawn(name, self._read(folders, len(listed))) for name, folders in listed]
        rows, columns, kept = [], [], []
        for folder, kind, name in zip(self.folders, kinds, names, strict=True):
            own = next((place for place, each in enumerate(drawn) if each.first.folder == folder), None)
            found = table_rows(folder) if kind == "comparison" else run_rows(folder, name, own)
            answered = answer_columns(folder, kind)
            rows += found
            columns += _named(answered, name, len(self.folders) > 1)
            kept += _kept(found, answered)
        untested = tell_apart(kept)
        rows = alike(rows)
        answers = side_by_side(columns, ANSWERS_BYTES)
        described = [
            _described(n, each, rows, bool(answers["rows"]), len(drawn)) for n, each in enumerate(drawn)
        ]
        return {
            "version": "",
            "title": ", ".join(names),
            "kinds": kinds,
            "made": time.strftime("%Y-%m-%d %H:%M", time.localtime()),
            "verdict": _verdict(kinds, rows, drawn, described, untested)._asdict(),
            "table": rows,
            "runs": described,
            "panels": [panel._asdict() for panel in PANELS],
            "answers": answers,
        }

    def _read(self, folders: Sequence[Path], share: int) -> list[Run]:
        """The runs in `folders`, the first whole and of the others the curves, with what is new in them."""
        runs = []
        for place, folder in enumerate(folders):
            most = 0 if place else max(24, REVISIONS // share)
            run = self._runs.setdefault((folder, not place), Run(folder, most))
            run.read()
            runs.append(run)
        return runs


def render(data: dict[str, Any], *, live: bool = False) -> str:
    """The page as one HTML text. live: it asks its server for newer data.

    What a model wrote is in the JSON block alone, and the scripts make text nodes of it; a policy in the page keeps
    any other script from running.
    """
    from jinja2 import Environment, select_autoescape

    script, style = script_of(*SCRIPTS), style_of(*STYLES)
    template = Environment(autoescape=select_autoescape(default=True)).from_string(asset("page.html"))
    return template.render(
        title=data["title"], data=to_json(data), script=script, style=style, live=live,
        script_hash=_hash(script), style_hash=_hash(style),
    )  # fmt: skip


def to_json(data: dict[str, Any]) -> str:
    """JSON that can stand inside a script element: without `<`, and without half characters."""
    written = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return written.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("<", "\\u003c")


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the folders' paths, as many as tell them apart."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(1, max((len(path.parts) for path in paths), default=1)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(path) for path in paths]


def _listed(
    folders: Sequence[Path], kinds: Sequence[Kind], names: Sequence[str]
) -> list[tuple[str, list[Path]]]:
    """What is drawn as one, by name, with its run folders."""
    listed = []
    for folder, kind, name in zip(folders, kinds, names, strict=True):
        if kind == "run":
            listed.append((name, [folder]))
        elif kind == "comparison":
            prefix = f"{name}: " if len(folders) > 1 else ""
            listed += [(prefix + method, seeds) for method, seeds in runs_in(folder)]
    return listed


def _named(columns: Sequence[Column], name: str, several: bool) -> list[Column]:
    """Columns of several folders: the students' by the folder's name; teachers and starts are taken as one."""
    if not several:
        return list(columns)
    return [
        Column(f"{name}: {each.name}" if each.role == "after" else each.name, each.role, each.file, each.set)
        for each in columns
    ]


def _kept(rows: Sequence[Row], columns: Sequence[Column]) -> list[Kept]:
    """The trained students of a folder whose answers are kept; those of a comparison are tested in its table."""
    files = {each.set: each.file for each in columns if each.role == "after"}
    return [Kept(row, files[row["set"]]) for row in rows if row["role"] == "after" and row["set"] in files]


def _described(number: int, drawn: Drawn, rows: Sequence[Row], answers: bool, share: int) -> dict[str, Any]:
    run, points = drawn.first, int(POINTS / share**0.5)
    recipe = run.recipe()
    measured = any(row["run"] == number and row["role"] == "after" for row in rows)
    measured = measured or (run.folder / "evaluation" / "results.json").is_file()
    return {
        "name": drawn.name,
        "seeds": len(drawn.runs),
        "names": names_of(recipe),
        "recipe": recipe_text(recipe),
        "state": run.state(recipe),
        "curves": curves([each.steps for each in drawn.runs], points),
        "spent": spent([each.steps for each in drawn.runs]),
        "evaluations": curves([each.evaluations for each in drawn.runs], points),
        "revisions": run.revisions.data(),
        "views": run.views.data(VIEWS_BYTES // share),
        "missing": run.missing(rows=measured, answers=answers),
    }


def names_of(recipe: dict[str, Any]) -> tuple[str, str]:
    """What is distilled, and into what: the last parts of both models' names; "" where the recipe does not say."""
    teacher = Path(text(recipe.get("teacher.model_name_or_path"))).name
    student = Path(text(recipe.get("student.model_name_or_path"))).name
    keep = recipe.get("student.prune.keep")
    if not student and keep is not None:
        student = f"{keep} of its layers" if isinstance(keep, int) else "a pruned copy"
    return teacher, student


def recipe_text(recipe: dict[str, Any]) -> dict[str, str]:
    """Every setting as the text that stands in a recipe."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, default=str)
        for name, value in recipe.items()
    }


def _verdict(
    kinds: Sequence[Kind],
    rows: Sequence[Row],
    drawn: Sequence[Drawn],
    described: Sequence[dict[str, Any]],
    untested: Sequence[str],
) -> verdict.Verdict:
    if "comparison" in kinds and len(kinds) == 1:
        return verdict.of_comparison(rows)
    if list(kinds) == ["run"]:
        run = drawn[0].first
        weights = sum(file.stat().st_size for file in run.folder.glob("student/*.safetensors"))
        return verdict.of_run(rows, run.steps, described[0]["state"], weights)
    if kinds and all(kind == "evaluation" for kind in kinds) and len(kinds) == 1:
        return verdict.of_evaluation(rows)
    return verdict.of_runs(rows, [(each.name, each.first.steps) for each in drawn], untested)
