"""The engine that `rollout.engine` names."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from redistill.config import Config
from redistill.engines.writer import Writer
from redistill.models import plain_model


def engine_of(
    config: Config, student: nn.Module, tokenizer: PreTrainedTokenizerBase, processes: int = 1
) -> Writer | None:
    """Who writes the student's answers; None for `loop`, which needs no engine of its own.

    student: on the device on which it is trained. processes: of the run.
    Errors: ValueError for vLLM in a run of several processes, for an engine that cannot write in step with them, and
    those of the engine's own start.
    """
    rollout = config.rollout
    if processes > 1 and not rollout.gather and rollout.engine != "loop":
        raise ValueError(
            f"rollout.engine {rollout.engine} reads whole models: set it to loop, or rollout.gather to true."
        )
    columns = config.data.max_prompt_length + rollout.max_completion_length
    if rollout.engine == "static":
        from redistill.engines.static_cache import StaticLoop, compiled_on

        return StaticLoop(student, columns, compiled_on(plain_model(student).device))
    if rollout.engine == "paged":
        from redistill.engines.paged import PagedBatching

        return PagedBatching(student)
    if rollout.engine == "vllm":
        if processes > 1:
            raise ValueError(
                f"rollout.engine vllm works in a run of one process, and this one has {processes}: set it to static."
            )
        if rollout.vllm.mode == "server":
            from redistill.engines.vllm_server import ServedVllm

            return ServedVllm(student, rollout.vllm, tokenizer)
        from redistill.engines.vllm_local import LocalVllm

        return LocalVllm(student, rollout.vllm, columns=columns, dtype=_dtype(config))
    return None


def _dtype(config: Config) -> str:
    """The number format in which the student computes."""
    if config.training.get("bf16"):
        return "bfloat16"
    return "float16" if config.training.get("fp16") else config.student.dtype
