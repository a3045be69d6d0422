"""An estimate on the terminal: what each phase holds, whether it fits, and what to switch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from redistill.console.tables import count_text, frame

if TYPE_CHECKING:
    from redistill.estimate import Estimate

GIB = 2**30
PARTS = {
    "student": "student", "teacher": "teacher", "gradients": "gradi-\nents", "optimizer": "opti-\nmizer",
    "activations": "activa-\ntions", "logits": "logits", "cache": "KV\ncache", "process": "pro-\ncess",
}  # fmt: skip


def estimate_table(estimate: Estimate) -> Table:
    """One line per phase: GiB by part when it holds most, and in all; the phase with the most stands out."""
    table = frame(*PARTS.values(), "GiB")
    for each in estimate.phases:
        parts = [each.parts.get(part, 0) for part in PARTS]
        style = "bold" if each.peak == estimate.peak else None
        table.add_row(each.name, *map(_gib, parts), _gib(each.peak), style=style)
    return table


def savers_table(estimate: Estimate) -> Table:
    """One line per saver: the peak under it alone, what that saves, what it costs; those that are to come last."""
    table = frame("peak\nGiB", "less\nGiB", "time", "changes", "--set")
    for column in table.columns[3:]:
        column.justify, column.no_wrap, column.overflow = "left", False, "fold"
    for each in estimate.savers:
        peak = max(phase.peak for phase in each.phases)
        less = estimate.peak - peak
        how = "\n".join(each.settings) if each.available else "not in this version"
        table.add_row(
            each.name,
            _gib(peak),
            _gib(less),
            each.time,
            each.changes,
            how,
            style=None if each.available else "dim",
        )
    return table


def estimate_text(estimate: Estimate) -> str:
    """Whether it fits, what to switch, and the least time that a step can take."""
    machine, student, teacher = estimate.machine, estimate.walk.student, estimate.walk.teacher
    trained = "" if student.trained == student.parameters else f" ({count_text(student.trained)} trained)"
    where = (
        f"{machine.processes} GPU{'s' * (machine.processes > 1)}" if machine.device == "cuda" else "the CPU"
    )
    sizes = f"Student {count_text(student.parameters)} parameters{trained}, teacher {count_text(teacher.parameters)}"
    lines = [
        f"{sizes}; on {where}, "
        f"at the longest prompts and answers: {estimate.peak / GIB:.2f} GiB{' each' * (machine.processes > 1)}."
    ]
    if machine.memory is not None:
        lines += _verdict(estimate, machine.memory)
    if estimate.replay:
        lines.append(
            f"A full replay buffer holds at most {estimate.replay / 2**20:,.1f} MiB of the host's memory."
        )
    if estimate.floor is not None and estimate.rate is not None:
        lines.append(
            f"At {estimate.rate / 1e12:,.3g} TFLOP/s its matrix products take {_seconds(estimate.floor)} a step; "
            "the step takes longer, above all where answers are written."
        )
    return "\n".join(lines)


def _verdict(estimate: Estimate, memory: int) -> list[str]:
    has, room = memory / GIB, estimate.machine.room
    if estimate.fits:
        return [f"It fits into {has:.4g} GiB."]
    lines = [f"It does not fit into {has:.4g} GiB."]
    if estimate.peak <= memory:
        lines = [
            f"It may not fit into {has:.4g} GiB: that is less than 15 % more, by which an estimate may be off."
        ]
    found = estimate.suggestion
    assert found is not None
    peak = max(each.peak for each in found.phases)
    switches = " ".join(f"--set {each}" for each in found.settings)
    if found.sharding.shared:
        processes, how = estimate.machine.processes, found.sharding
        switches += (
            f"\n  accelerate launch --num_processes {processes} {how.launch} -m redistill train ..\n"
            f"  ({how.name} shares the student between the GPUs; it was never run on GPUs with redistill)"
        )
    if found.fits:
        return [*lines, f"With these it takes {peak / GIB:.2f} GiB, and fits:", f"  {switches.strip()}"]
    missing = (peak - room) / GIB
    return [
        *lines,
        f"Nothing that redistill has makes it fit: with all of it a process holds {peak / GIB:.2f} GiB, "
        f"{missing:.2f} GiB too much (15 % are left as room). Take a smaller teacher or student, or more memory.",
    ]


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:,.0f} s"


def _gib(size: float) -> str:
    return "-" if not size else f"{size / GIB:,.2f}"
