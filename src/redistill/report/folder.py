"""What lies in a folder, and a run read bit by bit while it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from redistill.report.answers import Column
from redistill.report.curves import Columns
from redistill.report.plain import number, short
from redistill.report.revisions import Revisions
from redistill.report.scores import table_rows
from redistill.report.views import Views
from redistill.runlog import Tail

Kind = Literal["run", "evaluation", "comparison"]
SEARCHED = (
    "results.json",
    "rows-before.json",
    "recipe.yaml",
    "table.json",
    "student/config.json",
    "student/adapter_config.json",
)


def kind_of(folder: Path) -> Kind:
    """What wrote the folder; one without anything counts as a run that has not begun."""
    if (folder / "table.json").is_file() or any(folder.glob("runs/*/seed-*")):
        return "comparison"
    if (folder / "results.json").is_file() and not (folder / "recipe.yaml").is_file():
        return "evaluation"
    return "run"


def runs_in(folder: Path) -> list[tuple[str, list[Path]]]:
    """The methods of a comparison, in the order of its table, each with its runs, seed by seed."""
    seeds: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("runs/*/seed-*"), key=lambda path: (path.parent.name, _seed(path))):
        seeds.setdefault(path.parent.name, []).append(path)
    order = [row["name"] for row in table_rows(folder)]
    return sorted(seeds.items(), key=lambda found: order.index(found[0]) if found[0] in order else len(order))


def _seed(path: Path) -> int:
    digits = path.name.removeprefix("seed-")
    return int(digits) if digits.isdigit() else 0


def answer_columns(folder: Path, kind: Kind) -> list[Column]:
    """Where a folder keeps its models' answers: the teacher's, the student's before, the trained ones'."""
    if kind == "run":
        names = (("teacher", "teacher"), ("student before", "before"), ("student after", "after"))
        return [
            Column(name, role, file)
            for name, role in names
            if (file := folder / "answers" / f"{name.replace(' ', '-')}.jsonl").is_file()
        ]
    if kind == "evaluation":
        return _measured(folder, "student", "after", "teacher")
    columns = _measured(folder / "before", "start", "before", "teacher")
    for method, seeds in runs_in(folder):
        columns += _measured(seeds[0] / "evaluation", method, "after", None)
    return columns


def _measured(folder: Path, student: str, role: str, teacher: str | None) -> list[Column]:
    columns = []
    for who, name, part in (("teacher", teacher, "teacher"), ("student", student, role)):
        files = sorted([*folder.glob(f"answers-{who}.jsonl"), *folder.glob(f"*/answers-{who}.jsonl")])
        sets = [(file, "" if file.parent == folder else file.parent.name) for file in files if name]
        columns += [Column(str(name), part, file, set_name) for file, set_name in sets]
    return columns


class Run:
    """One run folder; `read` takes in what was added since the last call.

    most_revisions: how many are kept for the page; 0: only the curves are read, neither revisions nor close views.
    """

    def __init__(self, folder: Path, most_revisions: int) -> None:
        self.folder, self._most = folder, most_revisions
        kinds = ("steps", "evaluations", "revisions", "views") if most_revisions else ("steps", "evaluations")
        self._tails = {kind: Tail(folder / f"{kind}.jsonl") for kind in kinds}
        self.steps, self.evaluations, self.revisions, self.views = (
            Columns(),
            Columns(),
            Revisions(most_revisions),
            Views(),
        )

    def read(self) -> None:
        """Take in what is new in the folder's files."""
        anew: Mapping[str, Callable[[], Any]] = {
            "steps": Columns,
            "evaluations": Columns,
            "revisions": lambda: Revisions(self._most),
            "views": Views,
        }
        for kind, tail in self._tails.items():
            begun, records = tail.more()
            if begun:
                setattr(self, kind, anew[kind]())
            taker = getattr(self, kind)
            for record in records:
                taker.add(record)

    def recipe(self) -> dict[str, Any]:
        """Every setting of the run by its full name; empty where recipe.yaml is not there or no recipe."""
        try:
            tree = yaml.safe_load((self.folder / "recipe.yaml").read_text(encoding="utf-8", errors="replace"))
        except (OSError, yaml.YAMLError):
            return {}
        return dict(_flat(tree)) if isinstance(tree, dict) else {}

    def state(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """How far the run is. `steps`: those it is to do, None where a budget ends it. `left`: seconds, a guess."""
        steps, done = self.steps, self.steps.steps[-1] if self.steps.steps else 0
        planned = number(recipe.get("training.max_steps"))
        planned = int(planned) if planned and planned > 0 else None
        finished = any(
            (self.folder / "student" / name).is_file() for name in ("config.json", "adapter_config.json")
        )
        progress = steps.last("progress")
        if progress is None and planned:
            progress = done / planned
        spent, left = steps.total("seconds"), None
        if progress and 0 < progress < 1 and not finished:
            recent = steps.mean("seconds", -50)
            by_steps = (planned - done) * recent if planned and recent else None
            left = by_steps if by_steps is not None else spent * (1 - progress) / progress
        return {
            "done": done,
            "steps": planned,
            "progress": short(1.0 if finished else progress),
            "finished": finished,
            "seconds": short(spent),
            "left": short(left),
        }

    def missing(self, *, rows: bool, answers: bool) -> list[str]:
        """What the folder does not hold, and why that may be. rows, answers: whether there are any."""
        said = []
        if not self.steps.steps:
            said.append("steps.jsonl: no step was logged yet.")
        if not rows:
            said.append(
                "Scores: the run was not measured. A recipe with a section `evaluation` is, before and after."
            )
        if not answers:
            said.append("Answers: none are kept; they come with the section `evaluation`.")
        if not self.revisions.total:
            said.append(
                "revisions.jsonl: no answer was revised. SCRG needs rollout.lmbda and revision.rounds above 0."
            )
        if not self.views.total:
            why = self.views.missing or "Plain fine-tuning has none, nor has an older run."
            said.append(f"views.jsonl: no answer was seen closely. {why}")
        if not (self.folder / "recipe.yaml").is_file():
            said.append("recipe.yaml: the settings of the run are not known.")
        broken = sum(tail.broken for tail in self._tails.values())
        return said + [f"{broken} lines are no records and were passed over."] * bool(broken)


def watched(folders: Sequence[Path]) -> Iterator[Path]:
    """The files whose change is a change of the page."""
    for folder in folders:
        runs = [folder, *(path for _, seeds in runs_in(folder) for path in seeds)]
        for run in runs:
            yield from sorted(run.glob("*.jsonl"))
            yield from (run / name for name in SEARCHED)
        for pattern in (
            "answers/*.jsonl",
            "answers-*.jsonl",
            "*/answers-*.jsonl",
            "runs/*/*/evaluation/results.json",
        ):
            yield from sorted(folder.glob(pattern))


def _flat(tree: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
