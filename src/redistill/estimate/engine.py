"""What `transformers.Trainer` brings to a step and memory depends on, as the section `training` asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from redistill.loading import first_line
from redistill.models import plain_model


def autocast_of(training: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """The engine's mixed precision. A CPU's stands for a GPU's: what is kept in 16 bits is nearly the same."""
    dtype = torch.bfloat16 if training.get("bf16") else torch.float16 if training.get("fp16") else None
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def checkpoint_layers(training: Mapping[str, Any], student: PreTrainedModel) -> None:
    """Gradient checkpointing, where it is asked for under either of its names."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if training.get(name):
            options = training.get(f"{name}_kwargs")
            plain_model(student).gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def optimizer_of(training: Mapping[str, Any], student: PreTrainedModel) -> tuple[Any, dict[str, Any]]:
    """Class and options of the optimizer. Raises ValueError for one that cannot be made here."""
    prefixes = ("optim", "adam_", "learning_rate", "weight_decay")
    asked = {key: value for key, value in training.items() if key.startswith(prefixes)}
    try:
        arguments = TrainingArguments(use_cpu=True, report_to="none", **asked)
        return Trainer.get_optimizer_cls_and_kwargs(arguments, student)
    except (ValueError, ImportError, RuntimeError) as problem:
        name = asked.get("optim", "the optimizer")
        raise ValueError(f"training.optim: {name} cannot be made here: {first_line(problem)}") from problem
