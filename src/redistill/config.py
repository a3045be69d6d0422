"""A run's configuration: the sections of `settings.py` together, read from YAML and `a.b=c` overrides.

A refusal names the file and line (or the override), the setting, what is wrong, and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from redistill.config_faults import Key, faults, nearest, origin_of
from redistill.settings import (
    DacSettings,
    DataSettings,
    EvaluationSettings,
    LoraSettings,
    ObjectiveSettings,
    PruneSettings,
    RevisionSettings,
    RolloutSettings,
    Settings,
    SpanSettings,
    StudentSettings,
    TeacherSettings,
)
from redistill.yaml_lines import YamlError, parse_value, read_yaml

__all__ = [
    "Config",
    "ConfigError",
    "DacSettings",
    "DataSettings",
    "EvaluationSettings",
    "LoraSettings",
    "ObjectiveSettings",
    "PruneSettings",
    "RevisionSettings",
    "RolloutSettings",
    "SpanSettings",
    "StudentSettings",
    "TeacherSettings",
    "load_config",
]

ONE_FILE = (".jsonl", ".json", ".parquet")
"""Endings of the files that `data.path` may name."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message has one line per fault."""


class Config(Settings):
    """A whole run."""

    student: StudentSettings
    teacher: TeacherSettings
    data: DataSettings
    rollout: RolloutSettings = RolloutSettings()
    revision: RevisionSettings = RevisionSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    training: dict[str, Any] = Field(default_factory=dict)
    """Goes to transformers.TrainingArguments untouched."""
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        for wrong, key, sentence in _conflicts(self):
            if wrong:
                raise PydanticCustomError("conflict", "{sentence}", {"key": key, "sentence": sentence})
        return self

    def warnings(self) -> list[str]:
        """Sentences about settings that are allowed but likely not meant."""
        return [sentence for doubtful, sentence in _doubts(self) if doubtful]

    def to_yaml(self) -> str:
        """Every setting, defaults included, as text that `load_config` reads back to an equal Config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the YAML file `path`, with `overrides` like "rollout.lmbda=0.3" laid over it.

    An override's value is read as YAML; later ones win. Refused with a ConfigError: text that is not plain
    YAML (tags, anchors and aliases too), a key given twice, an unknown key, a value out of its range or of
    the wrong type (`1` is a number, `"1"` is not), a `training` key that transformers.TrainingArguments does
    not have, and sections that contradict each other.
    """
    try:
        values, lines = read_yaml(Path(path))
    except YamlError as error:
        raise ConfigError(str(error)) from None
    origins = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        _lay_over(values, origins, override)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(faults(error, Config, origins, str(path)))) from None
    unknown = list(_unknown_training_keys(config.training, origins, str(path)))
    if unknown:
        raise ConfigError("\n".join(unknown))
    return config


def _lay_over(values: dict[str, Any], origins: dict[Key, str], override: str) -> None:
    origin = f"--set {override}"
    name, equals, text = override.partition("=")
    key = tuple(part.strip() for part in name.split("."))
    if not equals or not all(key):
        raise ConfigError(f"{origin}: an override has the form section.setting=value, as rollout.lmbda=0.3.")
    try:
        value = parse_value(text)
    except YamlError as error:
        raise ConfigError(f"{origin}: {error}") from None
    inner = values
    for part in key[:-1]:
        if not isinstance(inner.get(part), dict):
            inner[part] = {}
        inner = inner[part]
    inner[key[-1]] = value
    for known in [known for known in origins if known[: len(key)] == key]:
        del origins[known]
    origins[key] = origin


def _unknown_training_keys(
    training: Mapping[str, Any], origins: Mapping[Key, str], file: str
) -> Iterator[str]:
    if not training:
        return
    from transformers.training_args import TrainingArguments

    names = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    for key in training:
        if key not in names:
            near = nearest(key, names).replace("name: ", "name: training.")
            origin = origin_of(("training", key), origins, file)
            yield f"{origin}: training.{key} is not an argument of transformers.TrainingArguments.{near}"


def _conflicts(config: Config) -> Iterator[tuple[bool, str, str]]:
    student, data, rollout, objective = config.student, config.data, config.rollout, config.objective
    adaptive = rollout.schedule == "adaptive"
    yield (
        student.prune is not None and student.model_name_or_path is not None,
        "student.prune",
        "student has both prune and model_name_or_path; keep one of them.",
    )
    yield (
        student.prune is None and student.model_name_or_path is None,
        "student",
        "no student: set student.model_name_or_path, or student.prune to make one from the teacher.",
    )
    yield (
        data.eval_split is not None and data.eval_path is None and Path(data.path).suffix in ONE_FILE,
        "data.eval_split",
        f"{data.path} is one file, which has no splits: set data.eval_path to the held-out file.",
    )
    yield (
        objective.sft_weight == objective.token_weight == objective.span_weight == 0,
        "objective",
        "objective.sft_weight, token_weight and span_weight are all 0, so there is nothing to train.",
    )
    yield (
        objective.dac.lower >= objective.dac.upper,
        "objective.dac.lower",
        "objective.dac.lower must be below objective.dac.upper.",
    )
    yield (
        adaptive and rollout.schedule_start > rollout.lmbda,
        "rollout.schedule_start",
        "the adaptive schedule rises to rollout.lmbda, so rollout.schedule_start must not be above that.",
    )
    yield (
        adaptive and data.eval_path is None and data.eval_split is None,
        "rollout.schedule",
        "the adaptive schedule follows the validation loss, so set data.eval_path or data.eval_split.",
    )
    yield (
        data.system is not None and data.template != "chat",
        "data.system",
        f"only the chat template has a system message, and data.template is {data.template}.",
    )


def _doubts(config: Config) -> Iterator[tuple[bool, str]]:
    rollout, dac, span = config.rollout, config.objective.dac, config.objective.span
    validates = config.training.get("eval_strategy", "no") not in ("no", False)
    yield (
        config.revision.rounds > 0 and rollout.lmbda == 0,
        "revision.rounds is above 0 but rollout.lmbda is 0: only prompts without a response are answered "
        "by the student and revised.",
    )
    yield (
        rollout.replay_ratio > 0 and rollout.lmbda == 0,
        "rollout.replay_ratio is above 0 but rollout.lmbda is 0: the replay buffer stays empty.",
    )
    yield (
        rollout.schedule == "adaptive" and not validates,
        "rollout.schedule is adaptive but training.eval_strategy is no: the share never grows.",
    )
    yield (
        config.objective.span_weight > 0 and span.chunker == "none",
        "objective.span_weight is above 0 but objective.span.chunker is none: the span loss is always 0.",
    )
    yield (
        dac.learnable and (dac.lower, dac.upper) != (0.0, 1.0),
        "objective.dac.lower and upper are ignored while objective.dac.learnable is true.",
    )
