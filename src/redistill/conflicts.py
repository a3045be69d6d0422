"""Settings that a teacher which is no model in this process cannot serve."""

from __future__ import annotations

from collections.abc import Iterator

from redistill.objective_settings import ObjectiveSettings
from redistill.settings import RolloutSettings, TeacherSettings


def conflicts_of_teacher(
    teacher: TeacherSettings, rollout: RolloutSettings, objective: ObjectiveSettings
) -> Iterator[tuple[bool, str, str]]:
    """Whether something is wrong, the setting, and a sentence about it."""
    cached = teacher.cache is not None
    yield (
        cached and rollout.lmbda > 0,
        "rollout.lmbda",
        "a cached teacher has not read what the student writes: with teacher.cache set rollout.lmbda to 0, or leave "
        "teacher.cache out.",
    )
    yield (
        cached and objective.temperature != 1,
        "objective.temperature",
        "of a cached teacher's tail only the mass at temperature 1 is known: with teacher.cache leave "
        "objective.temperature at 1.",
    )
