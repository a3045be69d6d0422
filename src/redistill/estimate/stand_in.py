"""The objective where tensors have no memory: its search for edges needs numbers, so it is tried on a few rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from redistill.batch import Counts
from redistill.config import ObjectiveSettings
from redistill.estimate.ledger import Ledger
from redistill.losses.chunked import Part
from redistill.models import Head
from redistill.objective import Objective, Written
from redistill.prepacked import computed
from redistill.teachers.signal import TopK

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


def narrowed(heads: Sequence[Head], training: Mapping[str, Any]) -> int:
    """Bytes of float32 heads in 16 bits, with which a GPU multiplies under autocast (`projection.py`)."""
    if not (training.get("bf16") or training.get("fp16")):
        return 0
    weights: list[Any] = [head.module.weight for head in heads]
    return sum(2 * heads[0].vocabulary * each.shape[1] for each in weights if each.dtype == torch.float32)


@contextmanager
def laid_out(ledger: Ledger, models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, the copies of each model's weights that `prepacked` makes, by part; it needs numbers to make them."""
    held: list[Tensor] = []
    for part, model in models.items():
        with ledger.noting(part):
            weights = [each.weight for each in model.modules() if isinstance(each, nn.Linear)]
            held += [torch.empty_like(each, dtype=computed(each)) for each in weights]
    yield
    del held


def holding_layers(cache: Any) -> list[Any]:
    """The layers of a cache that hold keys and values of every token, or of a window."""
    layers = [] if cache is None else cache.layers
    return [each for each in layers if isinstance(each, DynamicLayer) and each.is_initialized]


class SizedObjective(Objective):
    """Takes the place of the objective, so with its signature: holds what that would (`loss_needs`), and `beside`,
    and computes nothing."""

    def __init__(self, settings: ObjectiveSettings, needs: tuple[int, int], beside: int = 0):
        super().__init__(settings)
        self._needs, self._beside = needs, beside

    def forward(
        self,
        student: Tensor,
        teacher: Tensor | TopK | None,
        targets: Tensor,
        spans: Tensor,
        sft: bool,
        counts: Counts,
        written: Written | None = None,
    ) -> Part:
        """The gradient of the logits is the one thing that stays."""
        by_logits = torch.empty(student.shape, dtype=torch.float32)
        scratch = len(student) * self._needs[teacher is not None] - by_logits.nbytes
        torch.empty(max(0, scratch) + self._beside, dtype=torch.uint8)
        return Part(by_logits.new_zeros(()), by_logits, [], {})
