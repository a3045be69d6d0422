"""Exposure bias as excess accumulated error: how much worse a student errs on what it wrote itself.

    ExAccErr(l) = (R(l) - l eps(l)) / (l eps(l)) * 100 %
    R(l) = sum over t <= l of E[KL(p_t || q_t)], prefixes y_<t written by the student q
    l eps(l) = the same sum, prefixes written by the teacher p

Arora et al. (arXiv 2204.01171), with KL to the teacher as the error, as in MiniLLM (arXiv 2306.08543, B.5).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from redistill.sample import Sample

Divergences = Sequence[Sequence[float]]
"""KL(p || q) in nats at every position of some answers of unequal length."""

AT = 16
"""Where one number stands for the curve: the length at which MiniLLM's own script reads it."""


@dataclass(frozen=True)
class Curve:
    """Entry i belongs to length i + 1. All fields are equally long.

    percent: ExAccErr; 0 without exposure bias, negative where the student errs less on its own prefixes, None
        where the teacher-written prefixes give no error (the teacher against itself).
    accumulated: R, in nats. expected: l eps(l), in nats.
    student_answers, teacher_answers: how many answers reach the position.
    """

    percent: tuple[float | None, ...]
    accumulated: tuple[float, ...]
    expected: tuple[float, ...]
    student_answers: tuple[int, ...]
    teacher_answers: tuple[int, ...]

    def at(self, length: int) -> float | None:
        """ExAccErr at `length` tokens, from 1; None where the curve does not reach it."""
        return self.percent[length - 1] if 0 < length <= len(self.percent) else None


def excess_error(student: Divergences, teacher: Divergences, *, at_least: int = 1) -> Curve:
    """The curve from the divergences under student-written and under teacher-written prefixes.

    The mean at position t is over the answers that reach t: an answer that has ended says nothing about what
    comes behind. (MiniLLM's script counts 0 there instead, which makes a student that writes longer than its
    teacher look biased and a short-spoken one good.) So the means far out rest on few, long answers; the
    curve ends where fewer than `at_least` answers of either kind reach.
    Errors: ValueError for `at_least` under 1.
    """
    if at_least < 1:
        raise ValueError(f"at_least is {at_least}: give 1 or more answers.")
    (ours, own), (theirs, other) = (_means(each, at_least) for each in (student, teacher))
    length = min(len(ours), len(theirs))
    accumulated = tuple(itertools.accumulate(ours[:length]))
    expected = tuple(itertools.accumulate(theirs[:length]))
    return Curve(
        tuple(100.0 * (r - e) / e if e > 0 else None for r, e in zip(accumulated, expected, strict=True)),
        accumulated,
        expected,
        tuple(own[:length]),
        tuple(other[:length]),
    )


def answer_divergences(
    student: nn.Module,
    teacher: nn.Module,
    answered: Sequence[Sample],
    *,
    vocabulary: int,
    batch_size: int,
) -> list[list[float]]:
    """KL(p || q) in nats at each position of each answer, whoever wrote it, at temperature 1. No gradients."""
    from redistill.scoring import score

    scores = score(
        student,
        teacher,
        answered,
        vocabulary=vocabulary,
        teacher_token="argmax",
        generator=None,
        batch_size=batch_size,
    )
    return [each.kl.tolist() for each in scores]


def _means(answers: Divergences, at_least: int) -> tuple[list[float], list[int]]:
    """Mean and number of the answers at every position that enough of them reach."""
    columns: list[list[float]] = [
        [value for value in column if value is not None] for column in itertools.zip_longest(*answers)
    ]
    columns = list(itertools.takewhile(lambda column: len(column) >= at_least, columns))
    return [statistics.fmean(column) for column in columns], [len(column) for column in columns]
