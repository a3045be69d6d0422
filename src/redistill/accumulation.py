"""The micro-batches of one optimizer step while their gradients add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from redistill.batch import Batch, Row, split_by_length
from redistill.losses.chunked import Stats
from redistill.out_of_memory import Halving


class Accumulation:
    """One step's micro-batches, each read whole or, where the memory does not suffice, in pieces.

    batches, stats: what was read so far, and what the loss said of it. losses: scalars, one each.
    Losses are sums that are divided by the counts of the whole step, so a cut between rows changes no gradient.
    """

    def __init__(self, trained: Sequence[nn.Parameter], collate: Callable[[Sequence[Row]], Batch]):
        self.batches: list[Batch] = []
        self.stats: list[Stats] = []
        self.losses: list[Tensor] = []
        self._trained, self._collate = trained, collate
        self._given: list[Batch] = []
        self._done = 0

    def add(self, batch: Batch, loss: Tensor, stats: Stats) -> None:
        """Note what was read."""
        self.batches.append(batch)
        self.losses.append(loss.detach())
        self.stats.append(stats)

    def loss(self) -> float:
        """Of all that was read."""
        return float(sum(self.losses, torch.zeros(())))

    def read(self, batch: Batch, halving: Halving, step: Callable[[Batch], Tensor]) -> Tensor:
        """The loss of the next micro-batch; `step` is forward and backward, and calls `add`.

        A backward that fails has added a part of its gradients, and nobody knows which: all of them are dropped then,
        and the step's earlier micro-batches are read once more.
        """
        self._given.append(batch)

        def attempt(rows: int) -> Tensor:
            losses: list[Tensor] = []
            for each in self._given[self._done :]:
                losses = [step(piece) for piece in self._pieces(each, rows)]
                self._done += 1
            return torch.stack(losses).sum()

        return halving.run(max(len(each["rows"]) for each in self._given), attempt, self._start_anew)

    def _pieces(self, batch: Batch, rows: int) -> list[Batch]:
        parts = -(-len(batch["rows"]) // rows)
        if parts <= 1:
            return [batch]
        return [self._collate(part) for part in split_by_length(batch["rows"], parts)]

    def _start_anew(self) -> None:
        self.batches, self.stats, self.losses, self._done = [], [], [], 0
        for parameter in self._trained:
            parameter.grad = None
