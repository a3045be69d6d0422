"""What the processes of one run do together (torchrun, `accelerate launch`); in a single process it is nothing.

Their number and places stand in the environment, where the launcher puts them. Every rank must come by every call
that waits for the others, in the same order.
"""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch.nn import Parameter

T = TypeVar("T")
# How long the others wait while the first rank measures a model or holds a lock: as long as it takes.
_PATIENCE = timedelta(days=30)
_A_MINUTE = 60.0


class LostRank(RuntimeError):
    """Another process of the run has died, or can no longer be reached."""


def size() -> int:
    """The number of processes in the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def index() -> int:
    """This process's place among them, from 0."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return index() == 0


@contextmanager
def together(use_cpu: bool, timeout: float = 1800.0) -> Iterator[None]:
    """A run of several processes: they find each other here, before anything is loaded; what is said of a lost one
    is said in one sentence.

    use_cpu: talk over gloo alone. timeout: seconds that a step may wait for a rank.
    Raises LostRank.
    """
    if size() == 1:
        yield
        return
    import torch
    from torch import distributed

    # Sharded loading would leave other ranks than the first without weights until the first training step.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if not is_first():
        logging.getLogger("redistill").setLevel(logging.ERROR)
    on_gpu = torch.cuda.is_available() and not use_cpu
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if not distributed.is_initialized():
        distributed.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield
    except RuntimeError as problem:
        if not _is_lost(problem):
            raise
        raise LostRank(
            "another process of this run has died or cannot be reached; the last checkpoint is whole: run the same "
            f"command again to go on from there ({str(problem).strip().splitlines()[0][:200]})"
        ) from problem
    wait()
    _group.cache_clear()
    distributed.destroy_process_group()


def is_first_to_fail() -> bool:
    """Whether this process is the first of the run on its machine that asks: what fails on one ends the others, and
    is said once."""
    if size() == 1:
        return True
    # The launcher is the parent of all; its number may have been another's an hour ago.
    said = Path(tempfile.gettempdir()) / f"redistill-{os.getppid()}.failed"
    if said.exists() and time.time() - said.stat().st_mtime > _A_MINUTE:
        said.unlink(missing_ok=True)
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _is_lost(problem: RuntimeError) -> bool:
    from torch.distributed import DistError

    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    return isinstance(problem, DistError) or any(word in str(problem) for word in words)


@functools.cache
def _group() -> Any:
    """Objects travel over gloo, and with patience."""
    from torch import distributed

    return distributed.new_group(backend="gloo", timeout=_PATIENCE)


# What a rank still does for the others before it waits for them.
_owed: list[Callable[[], None]] = []


@contextmanager
def before_meeting(help_them: Callable[[], None]) -> Iterator[None]:
    """Inside, a rank does this whenever it comes to where all meet: what others need of it until they are there."""
    _owed.append(help_them)
    try:
        yield
    finally:
        _owed.remove(help_them)


def wanted_by_any(place: int | None, count: int) -> list[int]:
    """The places, of `count`, that some rank calls this with; one that calls it with None wants none."""
    import torch
    from torch import distributed

    wanted = torch.tensor([int(each == place) for each in range(count)], dtype=torch.int32)
    distributed.all_reduce(wanted, distributed.ReduceOp.MAX, group=_group())
    return wanted.nonzero().flatten().tolist()


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks, on all of them."""
    if size() == 1:
        return [value]
    from torch import distributed

    for help_them in _owed:
        help_them()
    found: list[Any] = [None] * size()
    distributed.all_gather_object(found, value, group=_group())
    return found


def wait() -> None:
    """Go on when all have come here."""
    gather(None)


def on_first(work: Callable[[], T]) -> T:
    """What `work` gives on the first rank, on all; the others wait. An error of it ends the run."""
    if size() == 1:
        return work()
    from torch import distributed

    found: list[Any] = [work() if is_first() else None]
    for help_them in _owed:
        help_them()
    distributed.broadcast_object_list(found, src=0, group=_group())
    return found[0]


def any_true(flag: bool) -> bool:
    """Whether it is true on any rank."""
    return any(gather(flag))


def total(numbers: Iterable[float]) -> list[float]:
    """Place by place, the sum over the ranks."""
    return [sum(each) for each in zip(*gather(list(numbers)), strict=True)]


def mine(items: Sequence[T]) -> Sequence[T]:
    """This rank's share of what all have: every `size`-th."""
    return items[index() :: size()]


def divided(count: int, work: Callable[[list[int]], Sequence[T]]) -> list[T]:
    """What `work` gives for the places 0, .., count - 1, a result each and in their order: every rank does its share,
    and all get all."""
    if size() == 1:
        return list(work(list(range(count))))
    own = list(mine(range(count)))
    results: list[Any] = [None] * count
    for rank, part in enumerate(gather(list(work(own)) if own else [])):
        results[rank :: size()] = part
    return results


def average_gradients(parameters: Iterable[Parameter]) -> None:
    """The mean of the gradients over the ranks, in place; one that a rank lacks counts as 0, unless all lack all."""
    parameters = list(parameters)
    if size() == 1 or not any_true(any(each.grad is not None for each in parameters)):
        return
    import torch
    from torch import distributed

    grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    flat = torch.cat([each.flatten() for each in grads])
    distributed.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([each.numel() for each in grads]), strict=True):
        parameter.grad = (part / size()).view_as(parameter)
