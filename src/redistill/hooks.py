"""The engine's moments that are ours: what it calls before, in and after each step."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback

from redistill import ranks
from redistill.in_step import readable
from redistill.views import Pair, choose, due, view

# Entries of the engine's own log that are kept, in memory and in every checkpoint; all of them are in steps.jsonl.
KEPT_LOGS = 500


class Hooks(TrainerCallback):
    """Hands them on to the `DistillTrainer`."""

    def __init__(self, trainer: Any):
        self.trainer, self._optimizing = trainer, ExitStack()
        self._begun_at = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.run_log.rewind(state.global_step)
        self.trainer.spending.add([self.trainer.spent_up_to(state.global_step)])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del state.log_history[:-KEPT_LOGS]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun_at = self.trainer.progress()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizing.enter_context(self.trainer.clock.phase("optimizer"))
        self.trainer.before_optimizer()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizing.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_step()
        if due(self._begun_at, self.trainer.progress()):
            self._look(state.global_step)
        if self.trainer.spending.bounded:
            # The engine's own step of the schedule came before this step's cost was known.
            scheduler: Any = self.trainer.lr_scheduler
            scheduler.step()
            if self.trainer.progress() >= 1:
                control.should_training_stop = control.should_save = True

    def _look(self, step: int) -> None:
        """One answer of the step, seen closely by the first rank; sharded models are read as in rollouts."""
        trainer = self.trainer
        if reason := self._cannot_look():
            if self._begun_at == 0:
                trainer.run_log.append("views", {"step": step, "missing": reason})
            return
        row = choose([row for batch in trainer._step.batches for row in batch["rows"]], step)
        student, teacher = trainer.pair.student, trainer.teacher
        gather = trainer.config.rollout.gather
        with trainer.accelerator.autocast(), readable(student, teacher.model, gather=gather):
            if row is None or not ranks.is_first():
                return
            pair = Pair(student, teacher, trainer.pair.vocabulary)
            seen = view(row.sample, row.spans(), pair, trainer.objective, trainer.tokenizer)
        trainer.run_log.append("views", {"step": step, **seen})

    def _cannot_look(self) -> str:
        """Why a run looks at no answer; "" if it does."""
        trainer, rollout = self.trainer, self.trainer.config.rollout
        if trainer.is_deepspeed_enabled:
            return "Under DeepSpeed none is."
        if trainer.is_fsdp_enabled and rollout.gather and not rollout.lmbda:
            return (
                "The models are sharded, and a run without answers of its own (rollout.lmbda is 0) does not put them "
                "together: there may be no room for that. Set rollout.gather to false."
            )
        return ""
