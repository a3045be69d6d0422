"""How far a run is: a panel of a few lines on a terminal, a plain line now and then where the output is kept."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from redistill.console.marks import Marked, excerpt, marked_revision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

TERMS = ("sft", "token", "span", "policy", "kl")


class StepDisplay:
    """Shows the steps of a training run. every: steps from one plain line to the next.

    tokenizer: with it the panel shows the last revision that `read` was told of.
    Under a budget nobody knows the number of steps: `progress` in the engine's figures, 0 to 1, says how far it is.
    """

    def __init__(
        self,
        console: Console,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        every: int = 5,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._every, self._clock, self._console, self._tokenizer = every, clock, console, tokenizer
        self._live: Live | None = None
        self._total: int | None = 0
        self._step = self._first = self._printed = 0
        self._started = self._seen = clock()
        self._done: float | None = None
        self._done_at_first = 0.0
        self._logs: Mapping[str, Any] = {}
        self._share = ""
        self._revision: Mapping[str, Any] | None = None
        self._marked: tuple[Marked, int] | None = None

    def start(self, step: int, total: int | None) -> None:
        """Training begins, with `step` of the run's `total` steps done already; None: nobody knows."""
        self._total, self._step, self._first, self._printed = total, step, step, step
        self._started = self._seen = self._clock()
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            # Training that ends in an error never says so; the cursor must come back all the same.
            atexit.register(self.close)
            self._live = Live(console=self._console, get_renderable=self.panel, refresh_per_second=2)
            self._live.start()

    def step(self, step: int) -> None:
        """`step` steps are done."""
        self._step, self._seen = step, self._clock()

    def read(self, kind: str, record: Mapping[str, Any]) -> None:
        """A record of the run log (`RunLog.readers`)."""
        if kind == "revisions":
            self._revision = record

    def show(self, step: int, logs: Mapping[str, Any]) -> None:
        """The engine's figures after `step`. Logs of another kind (validation, end of run) show nothing."""
        if not any(isinstance(logs.get(name), int | float) for name in ("loss", *TERMS)):
            return
        self.step(step)
        self._logs, self._share = logs, _revised(logs) or self._share
        if self._total is None and isinstance(logs.get("progress"), int | float):
            # What came before this process is not in its clock; its first step stands for it.
            self._done_at_first = self._done_at_first if self._done is not None else logs["progress"]
            self._done = logs["progress"]
        if self._live is not None:
            self._mark()
            self._live.refresh()
        elif step >= self._printed + self._every or step in (1, self._total):
            self._printed = step
            terms = " ".join(_terms(logs))
            parts = (f"step {self._steps()}", terms, _revised(logs), _speed(logs), self._left())
            line = "  ".join(part for part in parts if part)
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the panel as it stands and the terminal as it was; may be called again."""
        if self._live is not None:
            self._live.stop()
            atexit.unregister(self.close)

    def _mark(self) -> None:
        """Cut the last revision into its pieces: once a step, and here, not while the panel is drawn."""
        record, self._revision = self._revision, None
        if record is None or self._tokenizer is None:
            return
        ids = record["before_ids"], record["after_ids"], record["position"]
        self._marked = marked_revision("", *ids, self._tokenizer), record["step"]

    def panel(self) -> RenderableType:
        """The lines as they are now."""
        total, done = (self._total, self._step) if self._total else (1.0, self._done or 0.0)
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1, min_width=4)
        head.add_column(no_wrap=True, justify="right")
        head.add_row(Text(self._steps()), ProgressBar(total, done), Text(self._left()))
        # Of one width each, so that a figure that changes moves nothing else.
        facts = [f"{term:<13}" for term in _terms(self._logs)]
        pace = [f"{fact:<13}" for fact in (_speed(self._logs), self._share) if fact]
        lines: list[RenderableType] = [head]
        lines += [Columns([Text(fact) for fact in row], padding=(0, 1)) for row in (facts, pace) if row]
        if self._marked is not None:
            marked, step = self._marked
            lines.append(excerpt(marked, f"step {step}  "))
        return Group(*lines)

    def _steps(self) -> str:
        if self._total is not None:
            return f"{self._step}/{self._total}"
        return str(self._step) if self._done is None else f"{self._step} ({self._done:.0%})"

    def _left(self) -> str:
        if self._total is not None:
            done, left = self._step - self._first, self._total - self._step
        else:
            done, left = (self._done or 0.0) - self._done_at_first, 1.0 - (self._done or 0.0)
        if done <= 0:
            return ""
        # The step under way has used some of it.
        used = self._clock() - self._seen
        seconds = max((self._seen - self._started) / done * left - used, 0.0)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"


def training_progress(
    console: Console | None = None, *, shown: StepDisplay | None = None, bounded: bool = False
) -> TrainerCallback:
    """A callback for `transformers.Trainer` that shows steps, loss terms, tokens/s and time left.

    shown: where it shows them; a display on `console` if left out. bounded: a budget ends the run, not its number
    of steps.
    Only the first process shows anything. In place of the engine's bar and printer: set `disable_tqdm`
    and remove `PrinterCallback`.
    """
    from transformers import TrainerCallback

    display = shown or StepDisplay(console or Console())

    class TrainingProgress(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                display.start(state.global_step, None if bounded else state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                display.step(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                display.show(state.global_step, kwargs.get("logs") or {})

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            display.close()

    return TrainingProgress()


def _terms(logs: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {logs[name]:.3g}" for name in ("loss", *TERMS) if isinstance(logs.get(name), int | float)
    ]


def _revised(logs: Mapping[str, Any]) -> str:
    share = logs.get("share_revised")
    return f"revised {100 * share:.0f} %" if isinstance(share, int | float) else ""


def _speed(logs: Mapping[str, Any]) -> str:
    speed = logs.get("tokens_per_second")
    return f"{speed:.0f} tokens/s" if isinstance(speed, int | float) else ""
