"""Where the time of an optimizer step goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

# Entered with the name of a phase while it lasts, to measure more of it than its time (`meters.py`).
Meter = Callable[[str], AbstractContextManager[None]]


class Clock:
    """`seconds` by phase, as the host sees them: it never waits for a device, so work that is still queued on one
    falls to the phase that first needs its result.

    meters: what else is measured of each phase; what they do is part of its time.
    """

    def __init__(self, *meters: Meter) -> None:
        self.seconds: dict[str, float] = {}
        self._meters, self._started = meters, time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds what happens inside to a phase; one that lies in it is taken out of it."""
        started, before = time.perf_counter(), sum(self.seconds.values())
        try:
            with ExitStack() as measured:
                for meter in self._meters:
                    measured.enter_context(meter(name))
                yield
        finally:
            elsewhere = sum(self.seconds.values()) - before
            own = time.perf_counter() - started - elsewhere
            self.seconds[name] = self.seconds.get(name, 0.0) + own

    def record(self) -> dict[str, float]:
        """`seconds` since the clock was made, and `seconds_<phase>` of each phase."""
        whole = time.perf_counter() - self._started
        return {"seconds": whole} | {f"seconds_{name}": seconds for name, seconds in self.seconds.items()}
