"""Checkpoints and models that are whole or not there: written beside, then renamed; and our part of their content.

The engine saves student, optimizer, scheduler and its random states; `redistill.safetensors` and
`redistill.json` beside them hold the clip network, the rollout generator, the replay buffer and the schedule.
`SHA256SUMS`, written last, tells whether all of it is still what was saved.
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
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from redistill import ranks
from redistill.clip_optimizer import ClipOptimizer
from redistill.manifest import damaged_files, write_manifest
from redistill.replay import ShareSchedule
from redistill.rollout import RolloutState

PREFIX = "checkpoint-"
DAMAGED = "damaged-"
UNFINISHED = ".unfinished"
BASE = "base"
"""Name of the folder with the base of a run's adapters, where the run made that base itself."""
_GENERATOR = "rollout_generator"
_OPTIMIZER = "clip_optimizer."
# The second is torch.save's word for a write that came out short. Another run may have made room again since.
_NO_ROOM = ("No space left", "unexpected pos")


def save_state(
    folder: Path,
    objective: nn.Module,
    optimizer: ClipOptimizer,
    state: RolloutState,
    mark: dict[str, Any] | None = None,
) -> None:
    """Write our files into `folder`. mark: where a stream of data goes on; None without one."""
    tensors = {f"objective.{name}": value.contiguous() for name, value in objective.state_dict().items()}
    tensors |= {f"{_OPTIMIZER}{name}": value.contiguous() for name, value in optimizer.state().items()}
    tensors[_GENERATOR] = state.generator.get_state()
    save_file(tensors, folder / "redistill.safetensors")
    record = {"buffer": state.buffer.state(), "schedule": asdict(state.schedule)}
    record |= {} if mark is None else {"stream": mark}
    (folder / "redistill.json").write_text(json.dumps(record), encoding="utf-8")


def load_state(
    folder: Path, objective: nn.Module, optimizer: ClipOptimizer, state: RolloutState
) -> dict[str, Any] | None:
    """Put back what `save_state` wrote, in place; the mark of a stream of data, if there is one, is returned.

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
    kept = [name for name in tensors if name.startswith(_OPTIMIZER)]
    optimizer.load({name.removeprefix(_OPTIMIZER): tensors.pop(name) for name in kept})
    objective.load_state_dict({name.removeprefix("objective."): value for name, value in tensors.items()})
    record = json.loads((folder / "redistill.json").read_text(encoding="utf-8"))
    state.buffer.load(record["buffer"])
    state.schedule = ShareSchedule(**record["schedule"])
    return record.get("stream")


def finish(unfinished: Path, run: Path, state: TrainerState) -> Path:
    """Move a completely written checkpoint from `unfinished` into `run`, replacing one of the same step.

    `state` is the engine's, which may have noted the unfinished place as that of the best checkpoint.
    """
    target = run / unfinished.name
    if state.best_model_checkpoint == str(unfinished):
        state.best_model_checkpoint = str(target)
        state.save_to_json(str(unfinished / "trainer_state.json"))
    write_manifest(unfinished)
    for path in (unfinished, *unfinished.rglob("*")):
        _sync(path)
    if target.exists():
        target.replace(unfinished.with_name("replaced"))
    unfinished.replace(target)
    _sync(run)
    return target


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rotate(run: Path, limit: int | None, best: str | None = None) -> None:
    """Remove the oldest checkpoints over `limit` (None or 0: none); the newest and `best`, a path, always stay."""
    found = _newest_first(run)
    kept = {*found[:1], *([Path(best)] if best else [])}
    for folder in reversed(found):
        if not limit or len(found) <= max(limit, len(kept)):
            return
        if folder not in kept:
            _remove(run, folder)
            found = [each for each in found if each != folder]


def remove_all(run: Path) -> None:
    """Remove every checkpoint of a run that nobody will go on with."""
    for folder in reversed(_newest_first(run)):
        _remove(run, folder)


def _remove(run: Path, folder: Path) -> None:
    """Renamed first, so that no half of it is left under its name."""
    clear_unfinished(run)
    (run / UNFINISHED).mkdir()
    folder.replace(run / UNFINISHED / folder.name)
    clear_unfinished(run)


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was saved, by its name."""
    return int(folder.name.removeprefix(PREFIX))


def latest(run: Path, step: int | None = None) -> Path | None:
    """The newest checkpoint of a run folder, or of those up to `step`; or None."""
    return next((each for each in _newest_first(run) if step is None or step_of(each) <= step), None)


def _newest_first(run: Path) -> list[Path]:
    found = [each for each in run.glob(f"{PREFIX}*") if each.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def refuse_damaged(folder: Path) -> None:
    """Raises ValueError naming the files of a checkpoint that are no longer what was saved."""
    if files := damaged_files(folder):
        raise ValueError(
            f"{folder} is not as it was saved (damaged or missing: {', '.join(files)}): go on from another "
            "checkpoint. Whoever trusts the files as they are runs `sha256sum * > SHA256SUMS` in it."
        )


def set_damaged_aside(run: Path) -> list[str]:
    """Rename the checkpoints that are newer than the newest whole one; a sentence on each.

    In its place a damaged one would be written over, and would count as the newest when old ones are removed.
    Raises ValueError where there are checkpoints and none is whole: then nothing is renamed.
    """
    damaged: dict[Path, str] = {}
    for folder in _newest_first(run):
        if not (files := damaged_files(folder)):
            break
        damaged[folder] = ", ".join(files)
    else:
        if damaged:
            found = "; ".join(f"{folder.name}: {files}" for folder, files in damaged.items())
            raise ValueError(
                f"no checkpoint in {run} is as it was saved (damaged or missing: {found}). Bring one back, start "
                "anew with another --output, or, if you trust the files, run `sha256sum * > SHA256SUMS` in it."
            )
    for folder in damaged:
        aside = folder.with_name(DAMAGED + folder.name)
        shutil.rmtree(aside, ignore_errors=True)
        folder.replace(aside)
    return [
        f"{folder.name} is not as it was saved (damaged or missing: {files}): it is now {DAMAGED}{folder.name}, "
        "and its steps are trained again."
        for folder, files in damaged.items()
    ]


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Whatever a library raises for want of room becomes an OSError that says so (ENOSPC, with `folder`)."""
    try:
        yield
    except Exception as problem:
        number = problem.errno if isinstance(problem, OSError) else None
        said = any(each in str(problem) for each in _NO_ROOM) or number in (errno.ENOSPC, errno.EDQUOT)
        # What else a library may call it: look at the disk itself.
        if said or (isinstance(problem, RuntimeError) and shutil.disk_usage(folder).free < 2**20):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from problem
        raise


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    card: str | None = None,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """A plain Hugging Face model (or adapter) folder, whole or not there.

    card: the text of its README.md. weights: those of a model that is sharded, put together.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with saving(folder.parent):
            model.save_pretrained(str(partial), state_dict=weights)
            tokenizer.save_pretrained(str(partial))
            if card is not None:
                (partial / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
        # torchrun hands on the Ctrl-C that all of its processes have had already.
        if self.caught is not None and ranks.size() == 1:
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
        """Ask the engine for a checkpoint and the end; all ranks do if one was told."""
        if ranks.any_true(self.caught is not None):
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
