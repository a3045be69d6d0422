"""The runs of a comparison, each a process of its own: its memory is its own, and what fails fails alone.

OUTPUT/start/                     the common start, where the recipe makes its student by pruning
OUTPUT/before/                    teacher and start, measured
OUTPUT/runs/METHOD/seed-N/        an ordinary run folder; run.json: seconds, memory, or why it failed
OUTPUT/runs/METHOD/seed-N/evaluation/
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
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


class Stopped(KeyboardInterrupt):
    """A run was interrupted, and saved; the same command goes on."""


@dataclass(frozen=True)
class Run:
    """One run as it ended. train_seconds: of its steps; peak_memory_bytes: of the training process; failed: why."""

    method: str
    seed: int
    folder: Path
    steps: int = 0
    train_seconds: float = 0.0
    student_tokens: int = 0
    peak_memory_bytes: int = 0
    failed: str = ""


def run_all(plan: Plan, output: Path, console: Console) -> list[Run]:
    """Every run of `plan`, trained and measured; what is done already is not done again."""
    config = plan.config(plan.comparison.methods[0], plan.comparison.seeds[0])
    start = start_of(config, output)
    before = output / "before"
    if not (before / "results.json").is_file():
        console.print("Measuring the teacher and the common start", highlight=False)
        failed = _child(_evaluate(plan, config, start, before, teacher_row=True), before / "log.txt")[2]
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
    done = folder / "run.json"
    if done.is_file():
        record = json.loads(done.read_text(encoding="utf-8"))
        if not record["failed"]:
            return Run(**{**record, "folder": folder})
    folder.mkdir(parents=True, exist_ok=True)
    config = plan.config(method, seed)
    student = {**config.student.model_dump(), "prune": None, "model_name_or_path": start}
    tree = Config.model_validate({**config.model_dump(), "student": student})
    recipe = folder / "method.yaml"
    write_whole(recipe, tree.to_yaml())
    log = folder / "log.txt"
    memory, failed = 0, ""
    if (
        not (folder / "student" / "config.json").is_file()
        and not (folder / "student" / "adapter_config.json").is_file()
    ):
        _, memory, failed = _child(["train", str(recipe), "--output", str(folder)], log)
        if not failed:
            write_whole(folder / "memory.json", json.dumps(memory))
    elif (folder / "memory.json").is_file():
        memory = json.loads((folder / "memory.json").read_text())
    if not failed:
        command = _evaluate(plan, config, str(folder / "student"), folder / "evaluation", teacher_row=False)
        command += (
            ["--teacher-answers", str(output / "before")]
            if plan.comparison.evaluation.exposure_prompts
            else []
        )
        failed = _child(command, log)[2]
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
    write_whole(done, json.dumps({**asdict(run), "folder": str(folder)}, indent=1))
    return run


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


def _child(arguments: Sequence[str], log: Path) -> tuple[float, int, str]:
    """Run our own command: seconds, peak memory in bytes, and the last line it said if it failed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log.open("ab") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "redistill", *arguments], stdout=file, stderr=subprocess.STDOUT
        )
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except KeyboardInterrupt:
            child.wait()
            raise
    code = os.waitstatus_to_exitcode(status)
    child.returncode = code
    if code == STOPPED:
        raise Stopped
    failed = "" if code == 0 else _last_words(log, code)
    peak = usage.ru_maxrss if sys.platform == "darwin" else 1024 * usage.ru_maxrss
    return time.perf_counter() - started, peak, failed


def _last_words(log: Path, code: int) -> str:
    """Our own sentence, or the last line of whatever else it was."""
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    own = text.rpartition("redistill: ")[2] if "redistill: " in text else text.rpartition("\n")[2]
    return " ".join(own.split()) or f"it ended with exit code {code}"
