"""Settings that a teacher which is no model in this process, or data that are read as they come, cannot serve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from redistill.objective_settings import ObjectiveSettings
from redistill.settings import BudgetSettings, DataSettings, RolloutSettings, StudentSettings, TeacherSettings


def conflicts_of_teacher(
    student: StudentSettings,
    teacher: TeacherSettings,
    rollout: RolloutSettings,
    objective: ObjectiveSettings,
    data: DataSettings,
) -> Iterator[tuple[bool, str, str]]:
    """Whether something is wrong, the setting, and a sentence about it."""
    cached, served = teacher.cache is not None, teacher.server is not None
    quantized = teacher.load_in_8bit or teacher.load_in_4bit
    yield (
        cached and served,
        "teacher.server",
        "teacher.cache and teacher.server are both set; keep one of them.",
    )
    yield (
        served and (rollout.teacher_mix > 0 or objective.policy.weight > 0),
        "teacher.server",
        "rollout.teacher_mix and objective.policy.weight need the teacher's whole distribution: set both to 0, or "
        "leave out teacher.server.",
    )
    yield (
        teacher.load_in_8bit and teacher.load_in_4bit,
        "teacher.load_in_8bit",
        "teacher.load_in_8bit and teacher.load_in_4bit are both set; keep one of them.",
    )
    yield (
        teacher.offload and (quantized or teacher.device_map is not None),
        "teacher.offload",
        "teacher.offload moves weights as they are: leave it out, or load_in_8bit, load_in_4bit and device_map.",
    )
    yield (
        student.prune is not None and quantized,
        "student.prune",
        "no student is made of quantized layers: make one by `redistill prune`, for student.model_name_or_path.",
    )
    yield (
        cached and rollout.lmbda > 0,
        "rollout.lmbda",
        "a cached teacher has not read what the student writes: with teacher.cache set rollout.lmbda to 0, or leave "
        "teacher.cache out.",
    )
    yield (
        (cached or served) and objective.temperature != 1,
        "objective.temperature",
        "of a truncated teacher's tail only the mass at temperature 1 is known: with teacher.cache or teacher.server "
        "leave objective.temperature at 1.",
    )
    yield from _of_another_tokenizer(student, teacher, rollout, objective, data)


def _of_another_tokenizer(
    student: StudentSettings,
    teacher: TeacherSettings,
    rollout: RolloutSettings,
    objective: ObjectiveSettings,
    data: DataSettings,
) -> Iterator[tuple[bool, str, str]]:
    aligned = teacher.align is not None
    yield (
        aligned and (teacher.cache is not None or teacher.server is not None or student.prune is not None),
        "teacher.align",
        "teacher.align needs the teacher's model in this process and a student of its own: leave out teacher.cache, "
        "teacher.server and student.prune.",
    )
    yield (
        aligned and (rollout.teacher_mix > 0 or objective.policy.weight > 0 or data.responses == "teacher"),
        "teacher.align",
        "a teacher of another tokenizer writes other ids than the student's: with teacher.align leave "
        "rollout.teacher_mix and objective.policy.weight at 0, and data.responses at dataset.",
    )
    yield (
        aligned and objective.temperature != 1,
        "objective.temperature",
        "the probabilities of a teacher of another tokenizer are merged at temperature 1: with teacher.align leave "
        "objective.temperature at 1.",
    )


def conflicts_of_stream(
    data: DataSettings, budget: BudgetSettings, training: Mapping[str, Any]
) -> Iterator[tuple[bool, str, str]]:
    """As `conflicts_of_teacher`."""
    bounded = budget.seconds is not None or budget.student_tokens is not None
    most = training.get("max_steps", -1)
    yield (
        data.streaming and not bounded and not (isinstance(most, int) and most > 0),
        "data.streaming",
        "nobody knows how many records a stream has: with data.streaming set training.max_steps or a budget.",
    )
    yield (
        data.streaming and data.responses == "teacher",
        "data.responses",
        "the teacher's answers are written for all data before training: leave out data.streaming, or answer first.",
    )
    yield (
        data.streaming and training.get("dataloader_num_workers", 0) != 0,
        "training.dataloader_num_workers",
        "every worker would read the whole stream: with data.streaming leave training.dataloader_num_workers at 0.",
    )
