"""The engine's checkpoints with our state in them, whole or not there, and the same files whatever wraps the student:
a sharded one is put together for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from redistill import checkpoint, ranks, zero
from redistill.bad_steps import BadSteps
from redistill.clip_optimizer import ClipOptimizer
from redistill.objective import Objective
from redistill.rollout import RolloutState
from redistill.runlog import RunLog
from redistill.stream import Stream
from redistill.wrapped import is_sharded, local, part_of, whole_of, whole_weights


class WholeCheckpoints(Trainer):
    """The engine, whose checkpoints hold our state too, and of a sharded student are the files of an unsharded one;
    made for `DistillTrainer`."""

    run_log: RunLog
    objective: Objective
    clip_optimizer: ClipOptimizer
    rollout_state: RolloutState
    bad_steps: BadSteps
    # The engine's own, which it makes before any checkpoint is written or read.
    model: Any  # pyright: ignore[reportIncompatibleVariableOverride]
    optimizer: Any  # pyright: ignore[reportIncompatibleVariableOverride]
    lr_scheduler: Any  # pyright: ignore[reportIncompatibleVariableOverride]
    _unfinished: Path | None = None
    # DeepSpeed's, of the student; and what its optimizer was given, which it puts all in a row.
    zero_engine: Any = None
    _given: list[list[nn.Parameter]]

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """The engine's; DeepSpeed would only read checkpoints of its own."""
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        found = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.zero_engine = zero.apart(self.accelerator, self.model)
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return found

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The engine's."""
        optimizer = super().create_optimizer(model)
        self._given = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._unfinished or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let the engine write beside the run's checkpoints, add our state, then move it in as a whole."""
        run = self.run_log.folder
        ranks.on_first(lambda: checkpoint.clear_unfinished(run))
        self._unfinished = run / checkpoint.UNFINISHED
        written = self._unfinished / f"{checkpoint.PREFIX}{self.state.global_step}"
        try:
            with checkpoint.saving(run):
                super()._save_checkpoint(model, trial)
                ranks.wait()
                self.state.best_model_checkpoint = ranks.on_first(lambda: self._move_in(written, run))
        finally:
            self._unfinished = None
            if ranks.is_first():
                checkpoint.clear_unfinished(run)

    def _move_in(self, written: Path, run: Path) -> str | None:
        data, args = self.train_dataset, self.args
        trained_on = (
            self.state.global_step
            * args.gradient_accumulation_steps
            * args.train_batch_size
            * args.world_size
        )
        mark = data.mark(trained_on) if isinstance(data, Stream) else None
        checkpoint.save_state(written, self.objective, self.clip_optimizer, self.rollout_state, mark)
        checkpoint.finish(written, run, self.state)
        best = self.state.best_model_checkpoint
        # None goes while steps fail: the weights that are saved then may be what is wrong.
        if not self.bad_steps.in_a_row:
            checkpoint.rotate(run, self.args.save_total_limit, best)
        return best

    def load_weights(self, folder: Path) -> None:
        """Student, clip network and rollout state as a checkpoint has them, without going on to train."""
        self._load_from_checkpoint(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        checkpoint.refuse_damaged(folder)
        # Sharded or, where training is over already, not yet.
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            _load_weights(folder, self.model, in_engine=self.zero_engine is not None)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        mark = checkpoint.load_state(folder, self.objective, self.clip_optimizer, self.rollout_state)
        if mark is not None and isinstance(self.train_dataset, Stream):
            self.train_dataset.go_on(mark)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The student as a plain model folder."""
        if not (is_sharded(self.model) or self.is_deepspeed_enabled):
            return super().save_model(output_dir, _internal_call)
        return self._save(output_dir, state_dict=whole_weights(self.model))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.zero_engine is not None:
            whole = zero.optimizer_state(self.zero_engine, self._given)
        elif is_sharded(self.model):
            state = self.optimizer.state_dict()
            whole = {**state, "state": {place: whole_of(each) for place, each in state["state"].items()}}
        else:
            return super()._save_optimizer_and_scheduler(output_dir)
        if ranks.is_first():
            torch.save(whole, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        return None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        deepspeed = self.zero_engine
        if checkpoint is None or not (is_sharded(self.model) or deepspeed):
            return super()._load_optimizer_and_scheduler(checkpoint)
        folder = Path(checkpoint)
        whole = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        if deepspeed is not None:
            zero.load_optimizer_state(deepspeed, self._given, whole)
            self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
            return None
        parameters = [each for group in self.optimizer.param_groups for each in group["params"]]
        for place, state in whole["state"].items():
            whole["state"][place] = {name: part_of(each, parameters[place]) for name, each in state.items()}
        self.optimizer.load_state_dict(whole)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
        return None


def _load_weights(folder: Path, model: nn.Module, *, in_engine: bool) -> None:
    """Put the weights of a model folder (or of an adapter's) into a model, sharded or not. in_engine: DeepSpeed's."""
    named = model.state_dict(keep_vars=True)
    places = {name.replace(".default.", "."): value for name, value in named.items()}
    wanted = {id(value) for value in named.values() if value.requires_grad}
    for file in sorted(folder.glob("*model*.safetensors")):
        for name, value in load_file(file).items():
            wanted.discard(id(places[name]))
            if in_engine:
                zero.put(places[name], value)
                continue
            with torch.no_grad():
                local(places[name]).copy_(local(part_of(value, places[name])))
    if wanted:
        raise ValueError(f"{folder} has no weights for {len(wanted)} parts of the student: it is not whole.")
