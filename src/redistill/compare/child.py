"""One run of a comparison: trained by what `redistill train` does, then measured by what `redistill evaluate` does.

FOLDER/asked.json      what is to be done (`Task`)
FOLDER/memory.json     peak memory of the process that trained, in bytes; there once training is over
FOLDER/evaluation/     the measurement; FOLDER itself where nothing is trained
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from redistill import checkpoint
from redistill.commands import evaluate
from redistill.config import Config
from redistill.evaluation.results import peak_memory_bytes
from redistill.measure import Request
from redistill.run import train
from redistill.runlog import alone, write_whole


@dataclass(frozen=True)
class Task:
    """What one process of a comparison is asked.

    request: how is measured. teacher: id or folder. recipe: what is trained, as plain values; None: nothing, and
    `model` is measured, beside the teacher. teacher_answers: where they lie, for exposure bias.
    """

    request: Request
    teacher: str
    recipe: dict[str, Any] | None = None
    model: str | None = None
    teacher_answers: str | None = None


def read_task(folder: Path) -> Task:
    """The task in FOLDER/asked.json."""
    asked = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    request = asked.pop("request")
    lists = {name: tuple(request[name]) for name in ("sets", "seeds")}
    return Task(Request(**{**request, **lists}), **asked)


def work(folder: Path, console: Console) -> None:
    """Do the task in `folder`; each half goes on where it was stopped.

    Raises KeyboardInterrupt where the parent asked to stop, and whatever training and measuring raise.
    """
    stopped = _watch_parent()
    # The process of a comparison that was killed may still be saving here.
    with alone(folder / ".compare.lock"):
        task = read_task(folder)
        if task.recipe is not None and not (folder / "memory.json").is_file():
            _train(Config.model_validate(task.recipe), folder, console)
        # The student is saved. Kept, the states of all optimizers would be several times all students.
        checkpoint.remove_all(folder)
        # Asked to stop in its last step, training ends as if nothing had been said.
        if stopped.is_set():
            raise KeyboardInterrupt
        evaluate(
            task.model or str(folder / "student"),
            task.teacher,
            task.request,
            folder if task.recipe is None else folder / "evaluation",
            console,
            teacher_row=task.recipe is None,
            teacher_answers=Path(task.teacher_answers) if task.teacher_answers else None,
        )


def _train(config: Config, folder: Path, console: Console) -> None:
    for doubt in config.warnings():
        console.print(f"warning: {doubt}", highlight=False)
    if not train(config, folder, console).finished:
        raise KeyboardInterrupt
    write_whole(folder / "memory.json", json.dumps(peak_memory_bytes()))
    # Trainer, models and optimizer hold each other, and would lie beside the models that are measured.
    gc.collect()
    torch.cuda.empty_cache()


def _watch_parent() -> threading.Event:
    """Ctrl-C for ourselves once the parent closes our standard input: to stop us, or because it was killed."""
    stopped = threading.Event()
    # Under nohup, or in the background of a script, it would be ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)
        stopped.set()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()
    return stopped
