"""Where the time of an optimizer step goes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


class Clock:
    """`seconds` by phase, as the host sees them: it never waits for a device, so work that is still queued on one
    falls to the phase that first needs its result."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds what happens inside to a phase; phases do not lie in one another."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def each(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """The items; what it takes to make them is the phase's."""
        source = iter(items)
        while True:
            with self.phase(name):
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item
