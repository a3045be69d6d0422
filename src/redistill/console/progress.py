"""How far a run is: a bar on a terminal, a plain line now and then where the output is kept in a file."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

if TYPE_CHECKING:
    from transformers import TrainerCallback

TERMS = ("sft", "token", "span", "kl")


class StepDisplay:
    """Shows the steps of a training run. every: steps from one plain line to the next.

    Under a budget nobody knows the number of steps: `progress` in the engine's figures, 0 to 1, says how far it is.
    """

    def __init__(self, console: Console, *, every: int = 5, clock: Callable[[], float] = time.monotonic):
        self._every, self._clock, self._console = every, clock, console
        self._bar = _bar(console) if console.is_terminal else None
        self._task: TaskID | None = None
        self._total: int | None = 0
        self._first, self._printed, self._started = 0, 0, clock()
        self._done: float | None = None
        self._done_at_first = 0.0

    def start(self, step: int, total: int | None) -> None:
        """Training begins, with `step` of the run's `total` steps done already; None: nobody knows."""
        self._total, self._first, self._printed, self._started = total, step, step, self._clock()
        if self._bar is not None:
            # Training that ends in an error never says so; the cursor must come back all the same.
            atexit.register(self.close)
            done, steps = (step if total else 0), self._steps(step)
            self._task = self._bar.add_task(
                "", total=total or 1, completed=done, steps=steps, terms="", pace=""
            )
            self._bar.start()

    def step(self, step: int) -> None:
        """`step` steps are done."""
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, completed=step if self._total else self._done, steps=self._steps(step)
            )

    def show(self, step: int, logs: Mapping[str, Any]) -> None:
        """The engine's figures after `step`. Logs of another kind (validation, end of run) show nothing."""
        if not any(isinstance(logs.get(name), int | float) for name in ("loss", *TERMS)):
            return
        if self._total is None and isinstance(logs.get("progress"), int | float):
            # What came before this process is not in its clock; its first step stands for it.
            self._done_at_first = self._done_at_first if self._done is not None else logs["progress"]
            self._done = logs["progress"]
        pace = "  ".join(part for part in (_speed(logs), self._left(step)) if part)
        if self._bar is not None and self._task is not None:
            terms = _terms(logs, TERMS)
            done = step if self._total else self._done
            self._bar.update(self._task, completed=done, terms=terms, pace=pace, refresh=True)
        elif self._bar is None and (step >= self._printed + self._every or step in (1, self._total)):
            self._printed = step
            parts = (f"step {self._steps(step)}", _terms(logs, ("loss", *TERMS)), _revised(logs), pace)
            line = "  ".join(part for part in parts if part)
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _steps(self, step: int) -> str:
        if self._total is not None:
            return f"{step}/{self._total}"
        return str(step) if self._done is None else f"{step} ({self._done:.0%})"

    def close(self) -> None:
        """Leave the bar as it stands and the terminal as it was; may be called again."""
        if self._bar is not None:
            self._bar.stop()
            atexit.unregister(self.close)

    def _left(self, step: int) -> str:
        if self._total is not None:
            done, left = step - self._first, self._total - step
        else:
            done, left = (self._done or 0.0) - self._done_at_first, 1.0 - (self._done or 0.0)
        if done <= 0:
            return ""
        seconds = (self._clock() - self._started) / done * left
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"


def training_progress(console: Console | None = None, *, bounded: bool = False) -> TrainerCallback:
    """A callback for `transformers.Trainer` that shows steps, loss terms, tokens/s and time left.

    bounded: a budget ends the run, not its number of steps.
    Only the first process shows anything. In place of the engine's bar and printer: set `disable_tqdm`
    and remove `PrinterCallback`.
    """
    from transformers import TrainerCallback

    shown = StepDisplay(console or Console())

    class TrainingProgress(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                shown.start(state.global_step, None if bounded else state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                shown.step(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                shown.show(state.global_step, kwargs.get("logs") or {})

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            shown.close()

    return TrainingProgress()


def _bar(console: Console) -> Progress:
    def text(form: str) -> TextColumn:
        return TextColumn(form, markup=False, table_column=Column(no_wrap=True))

    return Progress(
        text("{task.fields[steps]}"),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
        text("{task.fields[terms]}"),
        text("{task.fields[pace]}"),
        console=console,
        refresh_per_second=2,
        expand=True,
    )


def _terms(logs: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return " ".join(f"{name} {logs[name]:.3g}" for name in names if isinstance(logs.get(name), int | float))


def _revised(logs: Mapping[str, Any]) -> str:
    share = logs.get("share_revised")
    return f"revised {100 * share:.0f} %" if isinstance(share, int | float) else ""


def _speed(logs: Mapping[str, Any]) -> str:
    speed = logs.get("tokens_per_second")
    return f"{speed:.0f} tokens/s" if isinstance(speed, int | float) else ""
