"""Which term looks at which sample of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable

from redistill.batch import Row, Spans
from redistill.config import ObjectiveSettings
from redistill.rollout import Drawn
from redistill.sample import Sample


def distils(objective: ObjectiveSettings) -> bool:
    """Whether any term looks at the teacher (or at the student's answers); plain fine-tuning has none."""
    return objective.token_weight > 0 or objective.span_weight > 0 or objective.policy.weight > 0


def rows_of(drawn: Drawn, objective: ObjectiveSettings, spans_of: Callable[[Sample], Spans]) -> list[Row]:
    """A reference is fitted; it, or the student's answer in its place, is distilled on."""
    rows: list[Row] = []
    distil = distils(objective)
    for place, reference in enumerate(drawn.references):
        answer = drawn.student.get(place)
        fit = objective.sft_weight > 0 and bool(reference.response)
        if answer is None:
            rows.append(Row(reference, fit, distil, spans_of(reference)))
            continue
        rows.append(Row(answer, False, distil, spans_of(answer)))
        if fit:
            rows.append(Row(reference, True, False))
    return rows
