"""What saves memory: one row each, from what costs least of a step's time to what costs most.

The costs are ours, an order and no measurement, but for checkpointing: there the student reads everything twice, and
of three parts of its arithmetic becomes a fourth. What changes the training itself comes last. docs/memory.md shows
the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from redistill.config import Config
from redistill.yaml_lines import parse_value

Overrides = tuple[str, ...]
More = Callable[[Config], Overrides]
Changes = Literal["nothing", "rounding", "training"]


@dataclass(frozen=True)
class Saver:
    """more: the overrides (a.b=c) that switch it on, or on by one step more; () where nothing is left to switch.
    time: what it costs of a step's. changes: of the result. on_cpu: of use there, where 16-bit numbers are slow.
    two_edged: it can cost memory too, by what it keeps for the backward."""

    name: str
    time: str
    changes: Changes
    more: More
    on_cpu: bool = True
    two_edged: bool = False


def _switched(setting: str, value: str, *, unless: Callable[[Config], object]) -> More:
    return lambda config: () if unless(config) else (f"{setting}={value}",)


def _halved(
    setting: str,
    number: Callable[[Config], int],
    least: int = 1,
    only: Callable[[Config], bool] | None = None,
) -> More:
    def more(config: Config) -> Overrides:
        now = number(config)
        return (
            (f"{setting}={max(least, now // 2)}",) if now > least and (only is None or only(config)) else ()
        )

    return more


def _smaller_batch(config: Config) -> Overrides:
    """The next smaller divisor, so that a step stays the same step."""
    names = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    batch, micro = (int(config.training.get(name, default)) for name, default in names.items())
    smaller = next((each for each in range(batch // 2, 0, -1) if batch % each == 0), 0)
    values = (smaller, micro * batch // smaller) if smaller else ()
    return tuple(f"training.{name}={value}" for name, value in zip(names, values, strict=False))


def _validates(config: Config) -> bool:
    return config.training.get("eval_strategy", "no") != "no"


def _validation_batch(config: Config) -> int:
    return int(config.training.get("per_device_eval_batch_size", 8))


def _measures(config: Config) -> bool:
    return "evaluation" in config.model_fields_set


def _writes(config: Config) -> bool:
    return config.rollout.lmbda > 0


def _checkpoints(config: Config) -> object:
    return config.training.get("gradient_checkpointing") or config.training.get("activation_checkpointing")


def _in_16_bits(config: Config) -> bool:
    mixed = config.training.get("bf16") or config.training.get("fp16")
    return bool(mixed) or config.student.dtype != "float32"


def _student_in_16_bits(config: Config) -> Overrides:
    """A pruned student has its teacher's dtype."""
    who = "student" if config.student.prune is None else "teacher"
    return () if getattr(config, who).dtype != "float32" else (f"{who}.dtype=bfloat16",)


SAVERS: tuple[Saver, ...] = (
    Saver(
        "teacher in bfloat16", "none; a GPU is faster", "rounding",
        _switched("teacher.dtype", "bfloat16", unless=lambda c: c.teacher.dtype != "float32" or c.student.prune),
        on_cpu=False,
    ),
    Saver(
        "computing in bfloat16", "none; a GPU is faster", "rounding",
        _switched("training.bf16", "true", unless=_in_16_bits), on_cpu=False, two_edged=True,
    ),
    Saver(
        "smaller slabs of logits", "about 1 % each time", "nothing",
        _halved("objective.chunk_size", lambda c: c.objective.chunk_size, 128),
    ),
    Saver(
        "smaller validation batches", "only validation's", "nothing",
        _halved("training.per_device_eval_batch_size", _validation_batch, only=_validates),
    ),
    Saver(
        "fewer answers measured at once", "only measuring's", "nothing",
        _halved("evaluation.batch_size", lambda c: c.evaluation.batch_size, only=_measures),
    ),
    Saver("smaller batches, more of them", "a few % each time", "nothing", _smaller_batch),
    Saver(
        "fewer answers written at once", "writing: up to twice, each time", "nothing",
        _halved("rollout.batch_size", lambda c: c.rollout.batch_size, only=_writes),
    ),
    Saver(
        "gradient checkpointing", "the student's loss part: a third", "nothing",
        _switched("training.gradient_checkpointing", "true", unless=_checkpoints),
    ),
    Saver(
        "logits in 16 bits", "none", "rounding",
        _switched("objective.float32_logits", "false",
                  unless=lambda c: not (c.objective.float32_logits and _in_16_bits(c))),
        on_cpu=False,
    ),
    Saver(
        "Adafactor", "a few %", "training",
        _switched("training.optim", "adafactor", unless=lambda c: c.student.lora or "optim" in c.training),
    ),
    Saver("student in bfloat16", "none", "training", _student_in_16_bits, on_cpu=False),
    Saver(
        "LoRA", "none", "training", _switched("student.lora.r", "16", unless=lambda c: c.student.lora),
        two_edged=True,
    ),
    Saver(
        "shorter answers", "none", "training",
        _halved("rollout.max_completion_length", lambda c: c.rollout.max_completion_length, 64),
    ),
    Saver(
        "shorter prompts", "none", "training",
        _halved("data.max_prompt_length", lambda c: c.data.max_prompt_length, 64),
    ),
)  # fmt: skip


def levels(saver: Saver, config: Config, device: str) -> list[Overrides]:
    """The overrides for no, one, two .. steps of a saver; each replaces the one before."""
    found: list[Overrides] = [()]
    while (saver.on_cpu or device != "cpu") and (more := saver.more(config)):
        found.append(more)
        config = with_settings(config, more)
    return found


def with_settings(config: Config, overrides: Sequence[str]) -> Config:
    """`config` under overrides that are known to be right."""
    values = config.model_dump(exclude_unset=True)
    for override in overrides:
        name, _, text = override.partition("=")
        *sections, last = name.split(".")
        inner: dict[str, Any] = values
        for section in sections:
            if not isinstance(inner.get(section), Mapping):
                inner[section] = {}
            inner = inner[section]
        inner[last] = parse_value(text)
    return Config.model_validate(values)
