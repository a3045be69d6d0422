"""Which term looks at which sample of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable

from redistill.batch import Row
from redistill.config import ObjectiveSettings
from redistill.rollout import Drawn
from redistill.sample import Sample


def distils(objective: ObjectiveSettings) -> bool:
    """Whether any term looks at the teacher (or at the student's answers); plain fine-tuning has none."""
    return objective.token_weight > 0 or objective.span_weight > 0 or objective.policy.weight > 0


def rows_of(
    drawn: Drawn, objective: ObjectiveSettings, spans_of: Callable[[Sample], tuple[int, ...]]
) -> list[Row]:
    """A reference is fitted; it, or the student's answer in its place, is distilled on."""
    rows: list[Row] = []
    distil = distils(objective)
    for place, reference in enumerate(drawn.references):
        answer = drawn.student.get(place)
        fit = objective.sft_weight > 0 and bool(reference.response)
        if answer is None:
            rows.append(Row(reference, spans_of(reference), fit, distil))
            continue
        rows.append(Row(answer, spans_of(answer), False, distil))
        if fit:
            rows.append(Row(reference, (-1,) * len(reference.response), True, False))
    return rows
