"""How far a measurement is: a bar on a terminal, a plain line now and then where the output is kept in a file."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from redistill.console.plain import one_line


class CountDisplay:
    """Shows prompts done out of all while it is entered. every: share of all from one plain line to the next."""

    def __init__(
        self,
        console: Console,
        title: str,
        *,
        every: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._console, self._title, self._every, self._clock = console, one_line(title), every, clock
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._first: int | None = None
        self._started, self._printed, self._said = clock(), 0, ""

    def __enter__(self) -> CountDisplay:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
                TextColumn("{task.fields[count]}", table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
                console=self._console,
                refresh_per_second=2,
                expand=True,
                transient=True,
            )
            self._task = self._bar.add_task(self._title, total=None, count="", left="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """`what` is being done now; `done` of `total` prompts are, of nobody knows how many with None."""
        count = str(done) if total is None else f"{done}/{total}"
        if self._first is None:
            self._first, self._started = done, self._clock()
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                description=f"{self._title}: {what}",
                completed=done,
                total=total,
                count=count,
                left=self._left(done, total),
            )
        elif self._bar is None and (
            what != self._said or done >= self._printed + self._every * (total or 4000)
        ):
            self._printed, self._said = done, what
            parts = (f"{self._title}: {what}", count, self._left(done, total))
            line = "  ".join(part for part in parts if part)
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _left(self, done: int, total: int | None) -> str:
        if self._first is None or total is None or done <= self._first or done >= total:
            return ""
        seconds = (self._clock() - self._started) / (done - self._first) * (total - done)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"
