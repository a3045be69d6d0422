"""Checkpoints that are whole or not there: written beside, then renamed; and our part of their content.

The engine saves student, optimizer, scheduler and its random states; `redistill.safetensors` and
`redistill.json` beside them hold the clip network, the rollout generator, the replay buffer and the schedule.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from redistill.replay import ShareSchedule
from redistill.rollout import RolloutState

PREFIX = "checkpoint-"
UNFINISHED = ".unfinished"
_GENERATOR = "rollout_generator"


def save_state(folder: Path, objective: nn.Module, state: RolloutState) -> None:
    """Write our files into `folder`."""
    tensors = {f"objective.{name}": value.contiguous() for name, value in objective.state_dict().items()}
    tensors[_GENERATOR] = state.generator.get_state()
    save_file(tensors, folder / "redistill.safetensors")
    record = {"buffer": state.buffer.state(), "schedule": asdict(state.schedule)}
    (folder / "redistill.json").write_text(json.dumps(record), encoding="utf-8")


def load_state(folder: Path, objective: nn.Module, state: RolloutState) -> None:
    """Put back what `save_state` wrote, in place.

    Raises ValueError when `folder` holds no such files: it was saved by something else, or is not whole.
    """
    missing = [n for n in ("redistill.safetensors", "redistill.json") if not (folder / n).is_file()]
    if missing:
        raise ValueError(
            f"{folder}: no {missing[0]} in this checkpoint, so it cannot be resumed; "
            "name one that redistill saved, or start anew in another output folder"
        )
    tensors = load_file(folder / "redistill.safetensors")
    state.generator.set_state(tensors.pop(_GENERATOR))
    objective.load_state_dict({name.removeprefix("objective."): value for name, value in tensors.items()})
    record = json.loads((folder / "redistill.json").read_text(encoding="utf-8"))
    state.buffer.load(record["buffer"])
    state.schedule = ShareSchedule(**record["schedule"])


def finish(unfinished: Path, run: Path, state: TrainerState) -> Path:
    """Move a completely written checkpoint from `unfinished` into `run`, replacing one of the same step.

    `state` is the engine's, which may have noted the unfinished place as that of the best checkpoint.
    """
    target = run / unfinished.name
    if state.best_model_checkpoint == str(unfinished):
        state.best_model_checkpoint = str(target)
        state.save_to_json(str(unfinished / "trainer_state.json"))
    for path in unfinished.rglob("*"):
        if path.is_file():
            _sync(path)
    if target.exists():
        shutil.rmtree(target)
    unfinished.replace(target)
    _sync(run)
    return target


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run folder, or None."""
    found = [p for p in run.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return max(found, key=lambda p: int(p.name.removeprefix(PREFIX)), default=None)


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Whatever a library raises for want of room becomes an OSError that says so (ENOSPC, with `folder`)."""
    try:
        yield
    except Exception as problem:
        number = problem.errno if isinstance(problem, OSError) else None
        said = "No space left" in str(problem) or number in (errno.ENOSPC, errno.EDQUOT)
        # torch.save reports a short write in words of its own: look at the disk itself.
        if said or (isinstance(problem, RuntimeError) and shutil.disk_usage(folder).free < 2**20):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from problem
        raise


def clear_unfinished(run: Path) -> None:
    """Remove what a killed save left behind."""
    shutil.rmtree(run / UNFINISHED, ignore_errors=True)


class SaveOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM: the step under way is finished and saved, then training stops. A second Ctrl-C stops
    at once. `caught` is the signal's number afterwards, or None."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.caught is not None:
            raise KeyboardInterrupt
        self.caught = number

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen; only the main thread may."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the engine for a checkpoint and the end."""
        if self.caught is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
