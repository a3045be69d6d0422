"""The engine's moments that are ours: what it calls before, in and after each step."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback

# Entries of the engine's own log that are kept, in memory and in every checkpoint; all of them are in steps.jsonl.
KEPT_LOGS = 500


class Hooks(TrainerCallback):
    """Hands them on to the `DistillTrainer`."""

    def __init__(self, trainer: Any):
        self.trainer, self._optimizing = trainer, ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.run_log.rewind(state.global_step)
        self.trainer.spending.add([self.trainer.spent_up_to(state.global_step)])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del state.log_history[:-KEPT_LOGS]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizing.enter_context(self.trainer.clock.phase("optimizer"))
        self.trainer.before_optimizer()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizing.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_step()
        if self.trainer.spending.bounded:
            # The engine's own step of the schedule came before this step's cost was known.
            scheduler: Any = self.trainer.lr_scheduler
            scheduler.step()
            if self.trainer.progress() >= 1:
                control.should_training_stop = control.should_save = True
