"""A run's configuration: the sections of `settings.py` together, read from YAML and `a.b=c` overrides.

A refusal names the file and line (or the override), the setting, what is wrong, and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from redistill.config_faults import Key, faults, listed, nearest, origin_of, shortened
from redistill.conflicts import conflicts_of_stream, conflicts_of_teacher
from redistill.methods import find_method
from redistill.objective_settings import DacSettings, ObjectiveSettings, PolicySettings, SpanSettings
from redistill.settings import (
    BudgetSettings,
    DataSettings,
    EvaluationSettings,
    LoraSettings,
    PruneSettings,
    RevisionSettings,
    RolloutSettings,
    Settings,
    StudentSettings,
    TeacherSettings,
    Text,
    VllmSettings,
)
from redistill.yaml_lines import YamlError, parse_value, read_yaml

__all__ = [
    "BudgetSettings",
    "Config",
    "ConfigError",
    "DacSettings",
    "DataSettings",
    "EvaluationSettings",
    "LoraSettings",
    "ObjectiveSettings",
    "PolicySettings",
    "PruneSettings",
    "RevisionSettings",
    "RolloutSettings",
    "SpanSettings",
    "StudentSettings",
    "TeacherSettings",
    "VllmSettings",
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
    budget: BudgetSettings = BudgetSettings()
    training: dict[str, Any] = Field(default_factory=dict)
    """Goes to transformers.TrainingArguments."""
    evaluation: EvaluationSettings = EvaluationSettings()
    method: Text | None = None
    """Name of the method (methods.yaml) whose settings hold where this recipe says nothing."""

    @field_validator("training")
    @classmethod
    def _no_is_a_word(cls, training: dict[str, Any]) -> dict[str, Any]:
        # YAML reads a bare `no` as false, and the engine's strategies (eval_strategy: no) then refuse it.
        return {
            key: "no" if value is False and key.endswith("_strategy") else value
            for key, value in training.items()
        }

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        of_teacher = conflicts_of_teacher(self.student, self.teacher, self.rollout, self.objective, self.data)
        for wrong, key, sentence in (*_conflicts(self), *_conflicts_of_methods(self), *of_teacher):
            if wrong:
                raise PydanticCustomError("conflict", "{sentence}", {"key": key, "sentence": sentence})
        return self

    def warnings(self) -> list[str]:
        """Sentences about settings that are allowed but likely not meant."""
        return [sentence for doubtful, sentence in _doubts(self) if doubtful]

    def to_yaml(self) -> str:
        """Every setting, defaults included, as text that `load_config` reads back to an equal Config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, overrides: Sequence[str] = (), method: str | None = None) -> Config:
    """The configuration in the YAML file `path`, with `overrides` like "rollout.lmbda=0.3" laid over it.

    method: its settings are laid over the file's, under the overrides. A `method` named in the file itself fills
    in only what the file leaves out.
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
    named = [override for override in overrides if override.partition("=")[0].strip() == "method"]
    _apply_method(values, origins, parse_value(named[-1].partition("=")[2]) if named else method)
    for override in (other for other in overrides if other not in named):
        _lay_over(values, origins, override)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(listed([*faults(error, Config, origins, str(path))])) from None
    unknown = list(_unknown_training_keys(config.training, origins, str(path)))
    if unknown:
        raise ConfigError(listed(unknown))
    return config


def _apply_method(values: dict[str, Any], origins: dict[Key, str], method: str | None) -> None:
    named = method or values.get("method")
    if not isinstance(named, str):
        return
    try:
        settings = find_method(named).settings
    except ValueError as error:
        raise ConfigError(f"{origins.get(('method',), 'method')}: {error}") from None
    for name, value in settings.items():
        key = tuple(name.split("."))
        section = _section(values, key)
        if method is not None or key[-1] not in section:
            section[key[-1]] = value
            origins[key] = f"method {named}"
    values["method"] = named


def _section(values: dict[str, Any], key: Key) -> dict[str, Any]:
    """The mapping that holds the last part of `key`, made where there is none."""
    inner = values
    for part in key[:-1]:
        if not isinstance(inner.get(part), dict):
            inner[part] = {}
        inner = inner[part]
    return inner


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
    _section(values, key)[key[-1]] = value
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
            name = shortened(f"training.{key}")
            yield f"{origin}: {name} is not an argument of transformers.TrainingArguments.{near}"


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
        objective.sft_weight
        == objective.token_weight
        == objective.span_weight
        == objective.policy.weight
        == 0,
        "objective",
        "objective.sft_weight, token_weight, span_weight and policy.weight are all 0: there is nothing to train.",
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
    yield from conflicts_of_stream(data, config.budget, config.training)


def _conflicts_of_methods(config: Config) -> Iterator[tuple[bool, str, str]]:
    rollout, objective = config.rollout, config.objective
    drawn_as_is = (rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p) == (1.0, 1.0, 0, 0.0)
    yield (
        objective.policy.weight > 0 and not (drawn_as_is and config.revision.rounds == 0),
        "objective.policy.weight",
        "the policy gradient needs the probability under which each token was written: rollout.temperature 1, "
        "top_p 1, top_k 0, min_p 0, and revision.rounds 0.",
    )
    yield (
        rollout.teacher_mix > 0 and rollout.engine != "loop",
        "rollout.engine",
        f"only the loop mixes in the teacher: rollout.teacher_mix is above 0, so {rollout.engine} cannot write.",
    )
    bounded = config.budget.seconds is not None or config.budget.student_tokens is not None
    warmup = config.training.get("warmup_steps", 0)
    yield (
        bounded and ("max_steps" in config.training or "num_train_epochs" in config.training),
        "budget",
        "a budget ends the run: leave out training.max_steps and training.num_train_epochs.",
    )
    yield (
        bounded and isinstance(warmup, int | float) and warmup >= 1,
        "training.warmup_steps",
        "under a budget the number of steps is not known: give training.warmup_steps as a share below 1.",
    )


def _doubts(config: Config) -> Iterator[tuple[bool, str]]:
    rollout, dac, span = config.rollout, config.objective.dac, config.objective.span
    validates = config.training.get("eval_strategy", "no") != "no"
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
        "vllm" in rollout.model_fields_set and rollout.engine != "vllm",
        f"rollout.vllm is set but rollout.engine is {rollout.engine}: vLLM is not used.",
    )
    yield (
        dac.learnable and (dac.lower, dac.upper) != (0.0, 1.0),
        "objective.dac.lower and upper are ignored while objective.dac.learnable is true.",
    )
