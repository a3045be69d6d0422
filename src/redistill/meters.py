"""What a phase of a step costs besides its time: memory and arithmetic; and what the machine could do at best.

Each meter is for one step and goes into its `Clock`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from redistill.prepacked import operators

REST = "rest"
_PROCESS = Path("/proc/self")


class PeakMemory:
    """`found`: the most bytes held during each phase, and under "rest" between phases; empty where nobody tells.

    On CUDA what torch has allocated there. On a CPU under Linux what the process has resident, so with the memory
    that was freed but kept for the next tensor; elsewhere nothing.
    """

    def __init__(self, device: torch.device):
        self.found: dict[str, int] = {}
        self._device = device
        self._inside = [REST]
        self._told = self._reset()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._take(self._inside[-1])
        self._inside.append(name)
        yield
        self._take(self._inside.pop())

    def _take(self, name: str) -> None:
        """What was the most since the last reset belongs to `name`."""
        if self._told:
            self.found[name] = max(self.found.get(name, 0), self._peak())
            self._reset()

    def _reset(self) -> bool:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return True
        if self._device.type != "cpu":
            return False
        try:
            (_PROCESS / "clear_refs").write_text("5")  # The peak is what is resident now (proc(5)).
        except OSError:  # Not Linux, or a container that forbids it.
            return False
        return True

    def _peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        lines = (_PROCESS / "status").read_text(encoding="ascii", errors="replace").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


# Products that torch's counter passes over, and those it knows that do the same work.
_SAME_WORK = {
    "addmm_": "addmm",
    "baddbmm_": "baddbmm",
    "_scaled_dot_product_flash_attention_for_cpu": "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "_scaled_dot_product_flash_attention_backward",
}


class Flops:
    """`found`: the floating point operations of each phase's matrix products, attention's included: 2mnk for one of
    [m, k] and [k, n]; what a mask hides counts as it is computed. Nothing else is counted.

    Counting takes time: not for a step that is timed.
    """

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        counter = _counter()
        before = sum(self.found.values())
        with counter:
            yield
        # What phases inside this one have found, it has seen too.
        elsewhere = sum(self.found.values()) - before
        self.found[name] = self.found.get(name, 0) + counter.get_total_flops() - elsewhere


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """For each operation that `Flops` counts: its arguments and `out_val`, its result, -> operations."""
    return _counter().flop_registry


def _counter() -> FlopCounterMode:
    counter = FlopCounterMode(display=False)
    known = counter.flop_registry
    known |= {_aten(unknown): known[_aten(same)] for unknown, same in _SAME_WORK.items()}
    if found := operators():
        _, multiply = found
        known[multiply] = _linear_flops
    return counter


def _linear_flops(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """Of `prepacked.py`'s layers, whose weights the counter does not take for tensors of its own."""
    return 2 * x.numel() * len(weight)


def _aten(name: str) -> object:
    return getattr(torch.ops.aten, name)


@contextmanager
def finished(_: str) -> Iterator[None]:
    """A meter that measures nothing, but has each phase wait for the work that it gave to an accelerator."""
    yield
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def matmul_rate(device: torch.device, dtype: torch.dtype, repeat: int = 7) -> float:
    """Floating point operations per second of a square matrix product here: median of `repeat`, after one that does
    not count; fewer where they take over five seconds."""
    # An accelerator is not filled by less.
    size = 2048 if device.type == "cpu" else 8192
    one = torch.randn(size, size, device=device).to(dtype)
    seconds: list[float] = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        with finished("product"):
            torch.mm(one, one)
        seconds.append(time.perf_counter() - started)
        if sum(seconds) > 5:
            break
    return 2 * size**3 / statistics.median(seconds[1:] or seconds)
