"""Run any loss on logits without ever holding the logits of the whole batch.

Hidden states and two heads go in, one scalar and the statistics come out. Two sizes of piece: a slab of positions is
projected at once, as matrix products want many rows; a block of it goes through the loss at once, small enough on a
CPU that its `[n, V]` tensors stay in the cache. The gradient of a block overwrites its logits, and is pulled back
through the head slab by slab, inside the forward: no projection is computed twice, and no slab's logits outlive it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

Stats = dict[str, Tensor]


class Part(NamedTuple):
    """What a loss says of one block of positions.

    loss: a scalar that is scaled already (weights, token counts). by_logits: its gradient, [n, V]. by_parameters: its
    gradient for the loss's own parameters, None for those it did not read. stats: for the log, no views of the
    logits; scalars are summed over blocks, per-token vectors joined in order.
    """

    loss: Tensor
    by_logits: Tensor
    by_parameters: Sequence[Tensor | None]
    stats: Stats


class Block(NamedTuple):
    """A run of positions; distill: whether the loss sees the teacher there."""

    start: int
    stop: int
    distill: bool


# (student's logits [n, V], what the teacher says or None, number of the block). It may overwrite the logits.
BlockLoss = Callable[[Tensor, Any, int], Part]


@runtime_checkable
class Source(Protocol):
    """What the teacher says at M positions: for a slab of them, and from that for a block of its rows."""

    def slab(self, rows: slice) -> Any:
        """Whatever is to be made for many positions at once."""
        ...

    def block(self, slab: Any, rows: slice) -> Any:
        """Logits [n, V], or what else the block loss takes."""
        ...


@runtime_checkable
class Projection(Protocol):
    """A head while a batch goes through it: one forward and at most one pull back for each slab, in turn."""

    @property
    def parameters(self) -> Sequence[Parameter]:
        """Those that want a gradient."""
        ...

    def project(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V], which belongs to the caller until the next call."""
        ...

    def logits(self, projected: Tensor) -> Tensor:
        """The logits of some rows of it: scaled and capped, where the model does so."""
        ...

    def chain(self, logits: Tensor, by_logits: Tensor) -> Tensor:
        """The gradient of what `logits` was given, for that of its result."""
        ...

    def pull_back(self, hidden: Tensor, by_projected: Tensor) -> Tensor:
        """The gradient of `hidden`, of any dtype; those of the parameters are added up. It may overwrite the
        second."""
        ...

    def gradients(self) -> Sequence[Tensor | None]:
        """What was added up, in the order of `parameters`."""
        ...


def merge(parts: Sequence[Stats]) -> Stats:
    """Join the statistics of several calls (micro-batches): scalars add up, per-token vectors join in order."""
    merged: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, value in part.items():
            merged.setdefault(name, []).append(value)
    return {
        name: torch.stack(values).sum() if values[0].dim() == 0 else torch.cat(values)
        for name, values in merged.items()
    }


def chunked(
    block_loss: BlockLoss,
    student: Projection,
    hidden: Float[Tensor, "N H"],
    teacher: Source | None,
    blocks: Sequence[Block],
    slab: int,
    parameters: Sequence[Parameter] = (),
) -> tuple[Tensor, Stats]:
    """The sum of `block_loss` over blocks of positions, with its gradients.

    teacher: of the first M positions, which hold all blocks with `distill`; no gradient goes there. None without any.
    blocks: in order; positions in none get gradient 0. slab: the most positions projected at once, exceeded only by a
    block that is longer. parameters: the loss's own. Autocast is off inside: it is for the heads to heed.

    Returns the scalar sum, attached to `hidden`, the student's head and `parameters`, and the merged statistics.
    """
    collected = _Collected(sum(block.stop - block.start for block in blocks))
    work = _Work(block_loss, student, teacher, tuple(_slabs(blocks, slab)), collected)
    with torch.autocast(hidden.device.type, enabled=False):
        if torch.is_grad_enabled():
            total = _GradientInForward.apply(work, hidden, *student.parameters, *parameters)
        else:
            total, _, _ = work.run(hidden, len(parameters), backward=False)
    return total, collected.stats()


class _Collected:
    """The statistics of all blocks, joined as `merge` does, but in memory that is taken once.

    Small tensors that outlive a block would lie in the holes that its large ones leave behind: the next block's no
    longer fit into these, and the process grows by megabytes with every block.
    """

    def __init__(self, positions: int):
        self._positions = positions
        self._room: Stats = {}
        self._filled: dict[str, int] = {}

    def add(self, stats: Stats) -> None:
        for name, value in stats.items():
            if name not in self._room:
                self._room[name] = value.new_zeros(() if value.dim() == 0 else (self._positions,))
                self._filled[name] = 0
            if value.dim() == 0:
                self._room[name] += value
            else:
                start = self._filled[name]
                self._filled[name] = start + len(value)
                self._room[name][start : start + len(value)] = value

    def stats(self) -> Stats:
        return {
            name: room if room.dim() == 0 else room[: self._filled[name]] for name, room in self._room.items()
        }


def by_autograd(
    loss: Callable[[Tensor, Tensor | None, int], tuple[Tensor, Stats]], parameters: Sequence[Parameter] = ()
) -> BlockLoss:
    """A block loss of any function of the logits that autograd can differentiate."""

    def block_loss(student: Tensor, teacher: Tensor | None, index: int) -> Part:
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            value, stats = loss(leaf, teacher, index)
            taken = torch.autograd.grad(value, (leaf, *parameters), allow_unused=True)
        by_logits = torch.zeros_like(student) if taken[0] is None else taken[0]
        # Copies: what is a view of the logits would be overwritten with them.
        kept = {name: each.detach().clone() for name, each in stats.items()}
        return Part(value.detach(), by_logits, taken[1:], kept)

    return block_loss


def add_up(sums: list[Tensor | None], more: Sequence[Tensor | None]) -> None:
    """Adds gradients in place; None is nothing."""
    for place, grad in enumerate(more):
        if grad is not None:
            before = sums[place]
            sums[place] = grad if before is None else before.add_(grad)


def _slabs(blocks: Sequence[Block], size: int) -> Iterator[list[tuple[int, Block]]]:
    """Runs of numbered blocks that lie side by side, all with or all without the teacher, of at most `size` rows."""
    run: list[tuple[int, Block]] = []
    for index, block in enumerate(blocks):
        if run:
            first, last = run[0][1], run[-1][1]
            if (block.start, block.distill) != (last.stop, last.distill) or block.stop - first.start > size:
                yield run
                run = []
        run.append((index, block))
    if run:
        yield run


class _Work(NamedTuple):
    block_loss: BlockLoss
    student: Projection
    teacher: Source | None
    slabs: tuple[list[tuple[int, Block]], ...]
    collected: _Collected

    def run(
        self, hidden: Tensor, count: int, *, backward: bool
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """The loss, the gradient of `hidden` and those of the loss's `count` parameters."""
        total = hidden.new_zeros((), dtype=torch.float32)
        # fp32, until the loss scale of float16 training is on it.
        wide = torch.promote_types(hidden.dtype, torch.float32)
        hidden_grad = torch.zeros_like(hidden, dtype=wide) if backward else hidden
        grads: list[Tensor | None] = [None] * count
        for slab in self.slabs:
            start, stop = slab[0][1].start, slab[-1][1].stop
            projected = self.student.project(hidden[start:stop])
            teacher = self.teacher if slab[0][1].distill else None
            seen = None if teacher is None else teacher.slab(slice(start, stop))
            for index, block in slab:
                rows = slice(block.start - start, block.stop - start)
                logits = self.student.logits(projected[rows])
                part = self.block_loss(logits, None if teacher is None else teacher.block(seen, rows), index)
                total += part.loss
                self.collected.add(part.stats)
                if not backward:
                    continue
                projected[rows] = self.student.chain(logits, part.by_logits)
                add_up(grads, part.by_parameters)
            if backward:
                hidden_grad[start:stop] = self.student.pull_back(hidden[start:stop], projected)
        return total, hidden_grad, grads


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, hidden: Tensor, *parameters: Parameter) -> Tensor:
        own = len(parameters) - len(work.student.parameters)
        total, hidden_grad, grads = work.run(hidden.detach(), own, backward=True)
        ctx.dtype = hidden.dtype
        # A head that no position has met gets 0 and not nothing: over ranks all must bring a gradient, or none.
        head = zip(work.student.parameters, work.student.gradients(), strict=True)
        heads = [torch.zeros_like(each) if grad is None else grad for each, grad in head]
        taken = [hidden_grad, *heads, *grads]
        # Not saved tensors: those would still be held when the gradients are handed on, which then are copied.
        ctx.taken = taken
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.taken is None:
            raise RuntimeError("the gradients of chunked() are taken once: call backward a single time.")
        (upstream,), taken, ctx.taken = grad_outputs, ctx.taken, None
        hidden_grad, *grads = (None if grad is None else grad.mul_(upstream) for grad in taken)
        return (None, None if hidden_grad is None else hidden_grad.to(ctx.dtype), *grads)
