"""The runs of a comparison, each a process of its own (`child.py`), with memory of its own.

OUTPUT/start/                     the common start, where the recipe makes its student by pruning
OUTPUT/before/                    teacher and start, measured
OUTPUT/runs/METHOD/seed-N/        an ordinary run folder; run.json: seconds, memory, or why it failed;
                                  asked.json: what it was asked, so that no other results pass for it
OUTPUT/runs/METHOD/seed-N/evaluation/
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from redistill.compare.child import Task
from redistill.compare.jobs import Job, run_jobs
from redistill.compare.plan import Plan
from redistill.config import Config
from redistill.models import load_model, load_tokenizer
from redistill.prepare import load_split, load_student
from redistill.run import save_model
from redistill.runlog import read, write_whole


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


def run_all(plan: Plan, output: Path, console: Console) -> list[Run]:
    """Every run of `plan`, trained and measured; what is done already is not done again.

    Methods and seeds may be added later. Raises ValueError where `output` holds results of other settings.
    """
    start = start_of(plan.common, output)
    tasks = {
        (method, seed): _task(plan, method, seed, start, output)
        for seed in plan.comparison.seeds
        for method in plan.comparison.methods
    }
    folders = {key: output / "runs" / key[0] / f"seed-{key[1]}" for key in tasks}
    before = Task(plan.request, plan.teacher, model=start)
    _keep_to({output / "before": before, **{folders[key]: task for key, task in tasks.items()}})
    _measure_before(output / "before", console)
    return _train_all(folders, console, plan.comparison.jobs)


def start_of(config: Config, output: Path) -> str:
    """Where the student begins: the recipe's model, or a folder with the pruned one, made once."""
    if config.student.model_name_or_path is not None:
        return config.student.model_name_or_path
    folder = output / "start"
    if not (folder / "config.json").is_file():
        tokenizer = load_tokenizer(config.teacher.model_name_or_path, config.teacher.model_revision)
        samples = load_split(
            config, tokenizer, config.data.path, config.data.split, config.data.limit
        ).samples
        teacher = load_model(
            config.teacher.model_name_or_path,
            dtype=config.teacher.dtype,
            revision=config.teacher.model_revision,
        )
        whole = config.student.model_copy(update={"lora": None})
        student = load_student(config.model_copy(update={"student": whole}), teacher, tokenizer, samples)
        save_model(student, tokenizer, folder)
    return str(folder)


def _task(plan: Plan, method: str, seed: int, start: str, output: Path) -> Task:
    # A section `evaluation` would let every run measure teacher and start once more.
    recipe = plan.config(method, seed).model_dump(mode="json", exclude={"evaluation"})
    recipe["student"] |= {"prune": None, "model_name_or_path": start}
    theirs = str(output / "before") if plan.comparison.evaluation.exposure_prompts else None
    return Task(plan.request, plan.teacher, recipe, teacher_answers=theirs)


def _keep_to(asked: Mapping[Path, Task]) -> None:
    """Note in each folder what is asked; ValueError where something else was, whose results would pass for this
    one's."""
    wanted = {folder: json.dumps(asdict(task), indent=1) for folder, task in asked.items()}
    for folder, text in wanted.items():
        path = folder / "asked.json"
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != json.loads(text):
            raise ValueError(
                f"{folder} holds results under other settings: choose another --output, or remove that folder."
            )
    for folder, text in wanted.items():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "asked.json", text)


def _measure_before(folder: Path, console: Console) -> None:
    def ended(_: Job, failed: str) -> None:
        if failed:
            raise ValueError(f"the start could not be measured: {failed}")

    if not (folder / "results.json").is_file():
        run_jobs([Job("Teacher and common start, measured", folder)], console, ended)


def _train_all(folders: Mapping[tuple[str, int], Path], console: Console, at_once: int) -> list[Run]:
    """Do what is not done yet, and return all."""
    jobs = [
        Job(f"{number}/{len(folders)}  {method}, seed {seed}", folder)
        for number, ((method, seed), folder) in enumerate(folders.items(), 1)
        if _failed(folder) != ""
    ]
    keys = {folder: key for key, folder in folders.items()}

    def ended(job: Job, failed: str) -> None:
        method, seed = keys[job.folder]
        _note(method, seed, job.folder, failed)

    run_jobs(jobs, console, ended, at_once=at_once)
    return [_read(folder) for folder in folders.values()]


def _failed(folder: Path) -> str | None:
    """Why the run in `folder` failed: "" if it did not, None if it did not end yet."""
    return _read(folder).failed if (folder / "run.json").is_file() else None


def _read(folder: Path) -> Run:
    record: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return Run(**{**record, "folder": folder})


def _note(method: str, seed: int, folder: Path, failed: str) -> None:
    """What the run log tells of a run that ended, in run.json."""
    steps = list(read(folder / "steps.jsonl"))
    memory = folder / "memory.json"
    run = Run(
        method,
        seed,
        folder,
        steps=len(steps),
        train_seconds=sum(record["seconds"] for record in steps),
        student_tokens=sum(record["student_tokens"] for record in steps),
        peak_memory_bytes=json.loads(memory.read_text(encoding="utf-8")) if memory.is_file() else 0,
        failed=failed,
    )
    write_whole(folder / "run.json", json.dumps({**asdict(run), "folder": str(folder)}, indent=1))
