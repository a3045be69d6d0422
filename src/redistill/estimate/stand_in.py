"""The objective where tensors have no memory: its search for edges needs numbers, so it is tried on a few rows."""

from __future__ import annotations

import torch
from torch import Tensor

from redistill.batch import Counts
from redistill.config import ObjectiveSettings
from redistill.estimate.ledger import Ledger
from redistill.losses.chunked import Part
from redistill.objective import Objective, Written

_ROWS = 4


def loss_needs(settings: ObjectiveSettings, vocabulary: int) -> tuple[int, int]:
    """The most bytes that a position's loss holds beside its logits, gradient included: without and with teacher.

    By doing it: the objective itself on a few rows of random logits. All tensors are [n, V], or [n] and far smaller,
    so that what n rows need is n times that of one; only which classes lie at DAC-KL's edges depends on numbers.
    `compile` leaves out some of them.
    """
    objective = Objective(settings.model_copy(update={"compile": False}), torch.Generator().manual_seed(0))
    shape, source, found = (_ROWS, vocabulary), torch.Generator().manual_seed(0), []
    written = Written(torch.zeros(_ROWS), torch.zeros(_ROWS))
    spans = torch.zeros(_ROWS, dtype=torch.long)  # one phrase: every row is in a pair
    for distil in (False, True):
        ledger = Ledger()
        with ledger:
            student = 3 * torch.randn(shape, generator=source)
            teacher = 3 * torch.randn(shape, generator=source) if distil else None
            before = ledger.held.total()
            with ledger.phase("loss"):
                objective(student, teacher, spans, spans, True, Counts(1, 1, 1), written)
        (most,) = ledger.accounts["loss"].stretches
        found.append((sum(most.values()) - before) // _ROWS)
    return found[0], found[1]


class SizedObjective(Objective):
    """Takes the place of the objective: holds what that would (`loss_needs`) and computes nothing."""

    def __init__(self, settings: ObjectiveSettings, needs: tuple[int, int]):
        super().__init__(settings)
        self._needs = needs

    def forward(
        self,
        student: Tensor,
        teacher: Tensor | None,
        targets: Tensor,
        spans: Tensor,
        sft: bool,
        counts: Counts,
        written: Written | None = None,
    ) -> Part:
        """The gradient of the logits is the one thing that stays."""
        by_logits = torch.empty(student.shape, dtype=torch.float32)
        beside = len(student) * self._needs[teacher is not None] - by_logits.nbytes
        torch.empty(max(0, beside), dtype=torch.uint8)
        return Part(by_logits.new_zeros(()), by_logits, [], {})
