"""The runs of a comparison, each a process of its own (`child.py`), with memory of its own.

OUTPUT/start/                     the common start, where the recipe makes its student by pruning
OUTPUT/before/                    teacher and start, measured
OUTPUT/runs/METHOD/asked.json     the search that its settings come from, or none
OUTPUT/runs/METHOD/seed-N/        an ordinary run folder; run.json: seconds, memory, or why it failed;
                                  asked.json: what it was asked, so that no other results pass for it
OUTPUT/runs/METHOD/seed-N/evaluation/
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from redistill.checkpoint import save_model
from redistill.compare.child import Task
from redistill.compare.jobs import Job, run_jobs
from redistill.compare.plan import Plan
from redistill.compare.search import Found, Point
from redistill.config import Config
from redistill.evaluation.readings import reference_divergences
from redistill.evaluation.suites import Asked
from redistill.measure import Request, load_sets, record_of
from redistill.models import load_tokenizer
from redistill.prepare import load_student, load_teacher
from redistill.runlog import read, write_whole
from redistill.splits import load_training


@dataclass(frozen=True)
class Run:
    """One run as it ended. train_seconds: of its steps; peak_memory_bytes: of the training process (the last
    one of a run that was stopped in between), up to the end of training; failed: why."""

    method: str
    seed: int
    folder: Path
    steps: int = 0
    train_seconds: float = 0.0
    student_tokens: int = 0
    peak_memory_bytes: int = 0
    failed: str = ""


def begin(plan: Plan, output: Path, console: Console) -> str:
    """Where every student begins (see `start_of`); that and the teacher are measured.

    Raises ValueError where `output` holds results of other settings or other data, and where what is to be asked is
    not there; then nothing is noted.
    """
    config, search = plan.common, plan.comparison.search
    _same_data(output / "before", load_sets(plan.request), plan.request.limit)
    start = start_of(config, output)
    if config.student.prune is not None:
        # Of the runs' recipes none says how the start was made.
        keep_to({output / "start": config.student.prune.model_dump(mode="json")})
    asked: dict[Path, Any] = {output / "before": Task(plan.request, plan.teacher, model=start)}
    for method in plan.comparison.methods:
        # Whether a method's settings were searched for, and among what, must not change under its results.
        wanted = search and {
            **search.model_dump(include={"trials", "seed", "by"}),
            "grid": search.grid(method),
        }
        asked[output / "runs" / method] = {"search": wanted}
    keep_to(asked)
    _measure_before(output / "before", console)
    return start


def _same_data(folder: Path, sets: Sequence[Asked], limit: int | None) -> None:
    """Raises ValueError where the data of a set are not those that were measured in `folder`, with the same limit."""
    path, noted = folder / "results.json", _noted(folder)
    if noted is None or noted["request"]["limit"] != limit or not path.is_file():
        return
    measured = json.loads(path.read_text(encoding="utf-8"))["sets"]
    versions = {each["name"]: each["version"] for each in measured}
    for record in map(record_of, sets):
        if (before := versions.get(record.name, record.version)) != record.version:
            raise ValueError(
                f"{record.source} has changed since this folder was begun (version {before}, now {record.version}): "
                "put back what was there, or choose another --output."
            )


def run_all(plan: Plan, found: Mapping[str, Found], start: str, output: Path, console: Console) -> list[Run]:
    """Every run of `plan` under the settings that were `found`, trained and measured; what is done already is not
    done again. Methods, seeds, evaluation sets, sampling seeds, greedy answers and exposure bias may be added later.

    Raises ValueError where `output` holds results of other settings.
    """
    runs = [
        Run(method, seed, output / "runs" / method / f"seed-{seed}")
        for seed in plan.comparison.seeds
        for method in plan.comparison.methods
    ]
    settings = {method: each.settings for method, each in found.items()}
    lost = {method for method, each in found.items() if each.best is None}
    keep_to(
        {
            run.folder: task_of(plan, run.method, run.seed, start, output, settings.get(run.method, {}))
            for run in runs
            if run.method not in lost
        }
    )
    planned = {
        f"{number}/{len(runs)}  {run.method}, seed {run.seed}": run
        for number, run in enumerate(runs, 1)
        if run.method not in lost
    }
    do_runs(planned, console, plan.comparison.jobs)
    return [read_run(run.folder) or replace(run, failed="all trials of its search were bad") for run in runs]


def start_of(config: Config, output: Path) -> str:
    """Where the student begins: the recipe's model, or a folder with the pruned one, made once."""
    if config.student.model_name_or_path is not None:
        return config.student.model_name_or_path
    folder = output / "start"
    if not (folder / "config.json").is_file():
        tokenizer = load_tokenizer(config.teacher.model_name_or_path, config.teacher.model_revision)
        samples = load_training(config, tokenizer).samples
        teacher = load_teacher(config, "cpu")
        whole = config.student.model_copy(update={"lora": None})
        student = load_student(
            config.model_copy(update={"student": whole}), teacher, tokenizer, samples, "cpu"
        )
        save_model(student, tokenizer, folder)
    return str(folder)


def task_of(
    plan: Plan,
    method: str,
    seed: int,
    start: str,
    output: Path,
    settings: Point,
    request: Request | None = None,
) -> Task:
    """The run of `method` with `seed` from `start`. settings: laid over the method's. request: how it is measured;
    None: as the comparison asks."""
    recipe = _recipe(plan.config(method, seed, settings))
    recipe["student"] |= {"prune": None, "model_name_or_path": start}
    request = request or plan.request
    theirs = str(output / "before") if request.exposure_prompts else None
    return Task(request, plan.teacher, recipe, teacher_answers=theirs)


def _recipe(config: Config) -> dict[str, Any]:
    """What is trained. A section `evaluation` would let every run measure teacher and start once more."""
    return config.model_dump(mode="json", exclude={"evaluation"})


def keep_to(asked: Mapping[Path, Any]) -> None:
    """Note in each folder what is asked, in asked.json; where evaluation sets, sampling seeds, greedy answers or
    exposure bias were added, as not yet done.

    Raises ValueError where something else was, whose results would pass for this one's; then nothing is noted.
    """
    wanted = {folder: _asked(folder, _plain(each)) for folder, each in asked.items()}
    for folder, now in wanted.items():
        folder.mkdir(parents=True, exist_ok=True)
        if now != _noted(folder):
            for result in ("run.json", "results.json"):
                (folder / result).unlink(missing_ok=True)
            write_whole(folder / "asked.json", json.dumps(now, indent=1))


def _asked(folder: Path, now: Any) -> Any:
    """What is to be noted in `folder`, where `now` is asked: that, with all the sets that were asked before."""
    before = _noted(folder)
    if before is None or before == now:
        return now
    if "request" in now:
        old, new = before["request"], now["request"]
        more = {
            "sets": [*dict.fromkeys([*old["sets"], *new["sets"]])],
            **{name: new[name] for name in ("seeds", "greedy", "exposure_prompts")},
        }
        nothing_less = (
            set(old["seeds"]) <= set(new["seeds"])
            and old["greedy"] <= new["greedy"]
            and old["exposure_prompts"] in (0, new["exposure_prompts"])
        )
        if nothing_less and old["exposure_prompts"] and old["seeds"][0] != new["seeds"][0]:
            raise ValueError(
                f"{folder}: exposure bias was measured with the evaluation seed {old['seeds'][0]}: name it first."
            )
        wanted = {**now, "request": {**new, **more}}
        # Where the teacher's answers lie follows from the rest.
        then = {**before, "request": {**old, **more}, "teacher_answers": now["teacher_answers"]}
        if nothing_less and then == wanted:
            return wanted
    raise ValueError(
        f"{folder} holds results under other settings: choose another --output, or remove that folder."
    )


def _noted(folder: Path) -> Any:
    """What was asked in `folder`, or None; with settings that did not exist then as they are when nothing is said."""
    path = folder / "asked.json"
    if not path.is_file():
        return None
    asked = json.loads(path.read_text(encoding="utf-8"))
    if "request" in asked:
        asked["request"] = _plain(Request()) | asked["request"]
    if asked.get("recipe"):
        with suppress(ValidationError):
            asked["recipe"] = _recipe(Config.model_validate(asked["recipe"]))
    return asked


def _plain(asked: Any) -> Any:
    return json.loads(json.dumps(asdict(asked) if isinstance(asked, Task | Request) else asked))


def _measure_before(folder: Path, console: Console) -> None:
    def ended(_: Job, failed: str) -> None:
        if failed:
            raise ValueError(f"the start could not be measured: {failed}")

    if not (folder / "results.json").is_file():
        run_jobs([Job("Teacher and common start, measured", folder)], console, ended)


def do_runs(planned: Mapping[str, Run], console: Console, at_once: int) -> None:
    """Do those of the runs (by the name that is printed) which did not end yet or failed, and note how they ended."""
    folders = {run.folder: run for run in planned.values()}
    jobs = [Job(name, run.folder) for name, run in planned.items() if _to_do(run.folder)]
    run_jobs(jobs, console, lambda job, failed: _note(folders[job.folder], failed), at_once=at_once)


def _to_do(folder: Path) -> bool:
    run = read_run(folder)
    return run is None or bool(run.failed)


def read_run(folder: Path) -> Run | None:
    """The run in `folder` as it ended; None if it did not yet."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    return Run(**{**json.loads(path.read_text(encoding="utf-8")), "folder": folder})


def _note(run: Run, failed: str) -> None:
    """What the run log tells of a run that ended, in run.json."""
    failed = failed or _not_finite(run.folder / "evaluation")
    steps = list(read(run.folder / "steps.jsonl"))
    memory = run.folder / "memory.json"
    run = replace(
        run,
        steps=len(steps),
        train_seconds=sum(record["seconds"] for record in steps),
        student_tokens=sum(record["student_tokens"] for record in steps),
        peak_memory_bytes=json.loads(memory.read_text(encoding="utf-8")) if memory.is_file() else 0,
        failed=failed,
    )
    write_whole(run.folder / "run.json", json.dumps({**asdict(run), "folder": str(run.folder)}, indent=1))


def _not_finite(evaluation: Path) -> str:
    """Why a student that was trained and measured is none, or ""."""
    readings = evaluation.glob("**/references-student.jsonl")
    if all(math.isfinite(value) for path in readings for value in reference_divergences(path)):
        return ""
    return "its student says nothing any more: its KL to the teacher is not a number (a lower learning rate?)"
