"""A step for which the memory does not suffice is taken again with half as many rows at once.

What is caught is an allocation that a device or the C library refuses. Where Linux promises more than it has and
kills the process for it, nothing can be caught: that run goes on from its last checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from redistill import ranks

Found = TypeVar("Found")
log = logging.getLogger(__name__)


class OutOfMemory(RuntimeError):
    """The memory does not suffice for a single row."""


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether an error says that memory was wanted and not had, on any device."""
    if isinstance(problem, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(problem, Exception) and should_reduce_batch_size(problem)


class Halving:
    """How many rows go through one piece of work at once: halved when memory does not suffice, never raised again.

    doing: what the work is called. setting: what bounds its rows; a lower one would have saved the failed attempt.
    rows: the most at once; None while nothing bounds them but what is given.
    """

    def __init__(self, doing: str, setting: str, rows: int | None = None):
        self.doing, self.setting, self.rows = doing, setting, rows

    def run(
        self, given: int, attempt: Callable[[int], Found], undo: Callable[[], object] = lambda: None
    ) -> Found:
        """What `attempt(rows at once)` gives for `given` rows; `undo` takes back what a failed one left behind.

        Raises OutOfMemory where one row is too much, and in one of several processes: all of them take the same
        steps, and the others do not know.
        """
        while True:
            rows = max(min(given, self.rows or given), 1)
            try:
                return attempt(rows)
            except Exception as problem:
                if not is_out_of_memory(problem):
                    raise
                if ranks.size() > 1:
                    raise OutOfMemory(
                        f"out of memory in {self.doing}, in one of {ranks.size()} processes: lower {self.setting}."
                    ) from problem
                if rows == 1:
                    raise OutOfMemory(
                        f"out of memory in {self.doing}, with one row at once: lower data.max_prompt_length or "
                        "rollout.max_completion_length, or (for the loss) objective.chunk_size."
                    ) from problem
            # Only here, with the error gone, is what its frames held given back.
            undo()
            clear_device_cache(garbage_collection=True)
            self.rows = (rows + 1) // 2
            log.warning(
                "out of memory in %s with %d rows at once: %d from now on, which gives the same result. "
                "A lower %s saves the attempt.", self.doing, rows, self.rows, self.setting,
            )  # fmt: skip
