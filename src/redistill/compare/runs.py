"""The runs of a comparison, each a process of its own: its memory is its own, and what fails fails alone.

OUTPUT/start/                     the common start, where the recipe makes its student by pruning
OUTPUT/before/                    teacher and start, measured
OUTPUT/runs/METHOD/seed-N/        an ordinary run folder; run.json: seconds, memory, or why it failed;
                                  asked.json: what it was asked, so that no other results pass for it
OUTPUT/runs/METHOD/seed-N/evaluation/
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from redistill.compare.plan import Plan
from redistill.config import Config
from redistill.models import load_model, load_tokenizer
from redistill.prepare import load_split, load_student
from redistill.run import save_model
from redistill.runlog import read, write_whole

STOPPED = 130


@dataclass(frozen=True)
class Run:
    """One run as it ended. train_seconds: of its steps; peak_memory_bytes: of the training process (the last
    one of a run that was stopped in between); failed: why."""

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
    config = plan.config(plan.comparison.methods[0], plan.comparison.seeds[0])
    start = start_of(config, output)
    before = output / "before"
    command = _evaluate(plan, config, start, before, teacher_row=True)
    _keep_to(before / "asked.json", command)
    if not (before / "results.json").is_file():
        console.print("Measuring the teacher and the common start", highlight=False)
        _, failed = _child(command, before / "log.txt")
        if failed:
            raise ValueError(f"the start could not be measured: {failed}")
    pairs = [(m, s) for s in plan.comparison.seeds for m in plan.comparison.methods]
    runs = []
    for number, (method, seed) in enumerate(pairs, 1):
        console.print(f"{number}/{len(pairs)}  {method}, seed {seed}", highlight=False)
        runs.append(_one(plan, method, seed, start, output))
        if runs[-1].failed:
            console.print(f"  failed: {runs[-1].failed}", style="red", highlight=False)
    return runs


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


def _one(plan: Plan, method: str, seed: int, start: str, output: Path) -> Run:
    folder = output / "runs" / method / f"seed-{seed}"
    config = plan.config(method, seed)
    student = {**config.student.model_dump(), "prune": None, "model_name_or_path": start}
    recipe = Config.model_validate({**config.model_dump(), "student": student}).to_yaml()
    measuring = _evaluate(plan, config, str(folder / "student"), folder / "evaluation", teacher_row=False)
    if plan.comparison.evaluation.exposure_prompts:
        measuring += ["--teacher-answers", str(output / "before")]
    _keep_to(folder / "asked.json", [recipe, *measuring])
    if (folder / "run.json").is_file():
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if not record["failed"]:
            return Run(**{**record, "folder": folder})
    memory, failed = _train(folder, recipe)
    if not failed:
        _, failed = _child(measuring, folder / "log.txt")
    steps = list(read(folder / "steps.jsonl"))
    run = Run(
        method,
        seed,
        folder,
        steps=len(steps),
        train_seconds=sum(record["seconds"] for record in steps),
        student_tokens=sum(record["student_tokens"] for record in steps),
        peak_memory_bytes=memory,
        failed=failed,
    )
    write_whole(folder / "run.json", json.dumps({**asdict(run), "folder": str(folder)}, indent=1))
    return run


def _train(folder: Path, recipe: str) -> tuple[int, str]:
    """Peak memory of the (last) training process, and why it failed; a trained student is not trained again."""
    kept = folder / "memory.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8")), ""
    write_whole(folder / "method.yaml", recipe)
    command = ["train", str(folder / "method.yaml"), "--output", str(folder)]
    memory, failed = _child(command, folder / "log.txt")
    if not failed:
        write_whole(kept, json.dumps(memory))
    return memory, failed


def _keep_to(path: Path, asked: list[str]) -> None:
    """Note what was asked; ValueError where something else was, whose results would pass for this one's."""
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != asked:
        raise ValueError(
            f"{path.parent} holds results under other settings: choose another --output, or remove that folder."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(asked))


def _evaluate(plan: Plan, config: Config, model: str, output: Path, *, teacher_row: bool) -> list[str]:
    asked = plan.comparison.evaluation
    command = ["evaluate", model, "--teacher", config.teacher.model_name_or_path, "--output", str(output)]
    command += (
        ["--sets", ",".join(asked.sets)]
        if asked.sets
        else ["--data", str(asked.path), "--split", asked.split]
    )
    command += ["--data-root", asked.data_root] if asked.data_root else []
    command += ["--limit", str(asked.limit)] if asked.limit else []
    command += ["--seeds", ",".join(map(str, asked.seeds)), "--batch-size", str(asked.batch_size)]
    command += ["--max-new-tokens", str(asked.max_new_tokens), "--template", config.data.template]
    command += ["--max-prompt-length", str(config.data.max_prompt_length)]
    command += ["--exposure-prompts", str(asked.exposure_prompts), "--dtype", config.student.dtype]
    return [*command, "--teacher-row" if teacher_row else "--no-teacher-row"]


def _child(arguments: Sequence[str], log: Path) -> tuple[int, str]:
    """Run our own command: its peak memory in bytes, and what it said last if it failed."""
    with log.open("ab") as file:
        begin = file.tell()
        child = subprocess.Popen(
            [sys.executable, "-m", "redistill", *arguments], stdout=file, stderr=subprocess.STDOUT
        )
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except KeyboardInterrupt:
            child.wait()
            raise
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode == STOPPED:
        raise KeyboardInterrupt
    failed = _last_words(log.read_bytes()[begin:].decode(errors="replace")) if child.returncode else ""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), failed


def _last_words(text: str) -> str:
    """Our own sentence, or the last line of whatever else was said."""
    text = text.strip()
    own = text.rpartition("redistill: ")[2] if "redistill: " in text else text.rpartition("\n")[2]
    return " ".join(own.split()) or "it said nothing"
