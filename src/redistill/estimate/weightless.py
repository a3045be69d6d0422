"""Student and teacher as a recipe makes them, from their configs alone: no weights are read and none are made."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from redistill.config import Config
from redistill.loading import base_of_adapter, first_line, refuse_missing_folder
from redistill.models import add_lora, parameter_count, plain_model
from redistill.student import prune_layers, select_layers


@dataclass(frozen=True)
class Configs:
    """What the models' folders or hub entries say of them."""

    teacher: PreTrainedConfig
    student: PreTrainedConfig


@dataclass(frozen=True)
class Size:
    """Of a model. parameters, trained: numbers. bytes, gradients: of all of it, and of what is trained. layer: bytes
    of its largest layer and of what lies outside its layers, which must be in one place at once."""

    parameters: int
    trained: int
    bytes: int
    gradients: int
    layer: int


def read_configs(config: Config) -> Configs:
    """Those of the recipe's two models. Raises ValueError for what has none, or is no causal language model, and for
    layers of a teacher that cannot be kept."""
    teacher, student = config.teacher, config.student
    theirs = read_config(teacher.model_name_or_path, teacher.model_revision)
    if student.prune is not None:
        return Configs(theirs, _pruned(theirs, student.prune.keep))
    assert student.model_name_or_path is not None
    return Configs(theirs, read_config(student.model_name_or_path, student.model_revision))


def read_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The config of a folder or hub id; of a folder with an adapter only, that of its base model."""
    folder = Path(name)
    configured = (folder / "config.json").is_file()
    if folder.suffix.lower() == ".gguf" or (not configured and any(folder.glob("*.gguf"))):
        raise ValueError(
            f"{name} is GGUF, which has no config.json: give the folder or hub id of the model in safetensors."
        )
    refuse_missing_folder(name)
    if folder.is_dir() and not configured:
        if not (folder / "adapter_config.json").is_file():
            raise ValueError(f"{name} has no config.json: it is not the folder of a saved model.")
        return read_config(base_of_adapter(folder))
    try:
        return AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as problem:
        raise ValueError(f"the config of {name!r} could not be had: {first_line(problem)}") from problem


def _pruned(config: PreTrainedConfig, keep: Any) -> PreTrainedConfig:
    teacher = _empty(config, "float32", None)
    # Which layers a number keeps depends on weights; their size does not.
    layers = select_layers(teacher, f"first:{keep}" if str(keep).isdecimal() else keep)
    return prune_layers(teacher, layers).config


def teacher_of(config: Config, configs: Configs) -> PreTrainedModel:
    """The teacher on torch's meta device. Raises ValueError for a config of another kind of model."""
    return _empty(configs.teacher, config.teacher.dtype, config.teacher.attn_implementation).requires_grad_(
        False
    )


def student_of(config: Config, configs: Configs) -> PreTrainedModel:
    """The student likewise, with LoRA where the recipe says so."""
    settings = config.student
    # A pruned one is a part of the teacher as it is.
    like = settings if settings.prune is None else config.teacher
    student = _empty(configs.student, like.dtype, like.attn_implementation)
    if settings.lora is None:
        return student
    with torch.device("meta"):
        return cast(PreTrainedModel, add_lora(student, settings.lora))


def _empty(config: PreTrainedConfig, dtype: str, attention: str | None) -> PreTrainedModel:
    how: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=getattr(torch, dtype), trust_remote_code=False, **how
            )
    except (ValueError, ImportError) as problem:
        raise ValueError(f"no model can be made of its config: {first_line(problem)}") from problem


def brought_to_cpu(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with new tensors on the CPU, one for each; for a `FakeTensorMode`, where they take no memory."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    kind = isinstance(old, nn.Parameter)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if kind else new
                held[name] = made[id(old)]
    return model


def sizes(config: Config, configs: Configs) -> tuple[Size, Size]:
    """Of student and teacher, whole."""
    return _size(student_of(config, configs)), _size(teacher_of(config, configs))


def _size(model: nn.Module) -> Size:
    trained = [each for each in model.parameters() if each.requires_grad]
    layers = layers_of(model)
    whole = _bytes(model)
    return Size(
        parameter_count(model),
        sum(each.numel() for each in trained),
        whole,
        sum(each.nbytes for each in trained),
        whole - _bytes(layers) + max(map(_bytes, layers), default=0),
    )


def _bytes(module: nn.Module) -> int:
    return sum(each.nbytes for each in (*module.parameters(), *module.buffers()))


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The largest list of modules in it."""
    lists = [module for module in plain_model(model).modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=_bytes, default=nn.ModuleList())


def output_rows(model: nn.Module) -> int:
    """Rows of the output matrix."""
    head: Any = plain_model(model).get_output_embeddings()
    return head.weight.shape[0]
