"""What DeepSpeed's ZeRO-2 and ZeRO-3 do otherwise than DDP and FSDP2; the one file that imports it.

accelerate lets DeepSpeed step inside the backward pass: `apart` takes the two apart again, so that a step that is
not finite can be left out. ZeRO-3 leaves each rank a part of every weight, and hooks gather a module's before its
forward. A weight marked as external they leave as it is: so heads, which the loss reads outside any forward, stay
whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
_STAGES = (2, 3)


def installed() -> bool:
    """Whether DeepSpeed is there."""
    return find_spec("deepspeed") is not None


class _Apart:
    """In accelerate's place: backward alone."""

    def __init__(self, engine: Any):
        self.engine = engine

    def backward(self, loss: Tensor, sync_gradients: bool = True, **options: Any) -> None:
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **options)

    def get_global_grad_norm(self) -> float | None:
        """Of the step before."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)


def settle(accelerator: Any) -> None:
    """Settings that must be so, before any engine is made. Raises ValueError for what cannot be so."""
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in _STAGES:
        raise ValueError(f"DeepSpeed's ZeRO stage {stage} is not supported: set it to 2 or 3.")
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise ValueError(f"leave {name} out of DeepSpeed's settings: the section training has it.")
    # Ranks read different things while they write: none may gather ahead, or keep what it has read.
    never = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0, "overlap_comm": False}
    config["zero_optimization"].update(never)


def apart(accelerator: Any, student: nn.Module) -> Any:
    """The student's engine, whose backward and step are apart from here on."""
    engine = accelerator.deepspeed_engine_wrapped.engine
    accelerator.deepspeed_engine_wrapped = _Apart(engine)
    if is_partitioned(student):
        _set_up(student, engine.optimizer.parameter_offload)
    return engine


def partition(model: nn.Module, accelerator: Any) -> None:
    """Leave each rank a part of a model that is not trained, under ZeRO-3; in place."""
    import deepspeed  # pyright: ignore[reportMissingImports]

    config = deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    if config["zero_optimization"]["stage"] != 3:
        return
    dtype = next(model.parameters()).dtype
    config |= {name: {"enabled": dtype == kind} for name, kind in _HALVES.items()}
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    config.pop("train_batch_size", None)
    config["zero_optimization"].pop("offload_optimizer", None)
    engine: Any = deepspeed.initialize(model=model, config=config, dist_init_required=False)[0]
    model.eval()
    _set_up(model, engine.optimizer)


_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _set_up(model: Any, offload: Any) -> None:
    """Head, and what DeepSpeed finds too small to share, whole on each rank, after each step anew; and hooks that
    gather what they need and no more.

    DeepSpeed would note in which order modules are read, and compare that over the ranks at each forward.
    """
    coordinator = offload.get_param_coordinator()
    coordinator.reset_step = coordinator._clean_inflight_param_registry
    head = [each for each in model.get_output_embeddings().parameters() if not each.ds_persist]
    offload.persistent_parameters.extend(head)
    for each in offload.persistent_parameters:
        each.ds_persist = each.is_external_param = True
    _gather(offload.persistent_parameters)


def _gather(parameters: Sequence[Any]) -> None:
    if parameters:
        parameters[0].all_gather(parameters)


# One optimizer step


def finite(engine: Any) -> bool:
    """Whether the gradients of all ranks are."""
    return not engine.optimizer.has_overflow()


def take_step(engine: Any) -> None:
    """Update the weights."""
    engine.step()


def leave_out(engine: Any) -> None:
    """Drop the gradients, as DeepSpeed does with those that overflow."""
    optimizer = engine.optimizer
    before = vars(optimizer).get("check_grad_overflow")
    optimizer.check_grad_overflow, optimizer.has_overflow = True, lambda *_, **__: True
    try:
        engine.step()
    finally:
        del optimizer.has_overflow
        optimizer.check_grad_overflow = before
    # Otherwise accelerate holds back the schedule, which goes on over such a step without DeepSpeed.
    optimizer.overflow = False
    # ZeRO-3 takes them apart before it looks, and together only after an update.
    _gather(vars(optimizer).get("persistent_parameters", []))


# Weights in parts


def is_partitioned(model: nn.Module | None) -> bool:
    """Whether ZeRO-3 has left each rank a part of its weights."""
    return model is not None and any(_in_parts(each) for each in model.parameters())


def _in_parts(value: Any) -> bool:
    return isinstance(value, nn.Parameter) and "ds_id" in vars(value)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every rank holds the whole of a model, and its hooks leave it so."""
    parted: list[Any] = [each for each in model.parameters() if not vars(each)["is_external_param"]]
    for each in parted:
        each.is_external_param = True
    _gather(parted)
    try:
        yield
    finally:
        for each in parted:
            each.is_external_param = False
        if parted:
            parted[0].partition(parted)


def whole(value: Tensor) -> Tensor:
    """A weight put together, as exact as the optimizer has it; all ranks must call it."""
    trained = {"_hp_mapping", "_z3_optimizer"} & {*vars(value)}
    if trained and value.dtype != torch.float32:
        from deepspeed.utils import safe_get_full_fp32_param  # pyright: ignore[reportMissingImports]

        return safe_get_full_fp32_param(value)
    if not _in_parts(value):
        return value.detach()
    from deepspeed.runtime.zero import GatheredParameters  # pyright: ignore[reportMissingImports]

    with GatheredParameters([value]):
        return value.detach().clone()


def parameter_count(model: nn.Module) -> int:
    """The number of parameters, those on other ranks too; tied weights counted once."""
    every: list[Any] = list(model.parameters())
    return sum(each.ds_numel if _in_parts(each) else each.numel() for each in every)


def put(parameter: Any, value: Tensor) -> None:
    """Give a weight of an engine's model a value; all ranks must call it."""
    from deepspeed.runtime.zero import GatheredParameters  # pyright: ignore[reportMissingImports]
    from deepspeed.utils import safe_set_full_fp32_param  # pyright: ignore[reportMissingImports]

    with GatheredParameters([parameter] if _in_parts(parameter) else [], modifier_rank=0), torch.no_grad():
        parameter.copy_(value)
    if parameter.requires_grad:
        safe_set_full_fp32_param(parameter, value.to(parameter.device, torch.float32))


# The optimizer's state, as an optimizer of whole weights has it


def optimizer_state(engine: Any, groups: Sequence[Sequence[nn.Parameter]]) -> dict[str, Any]:
    """groups: the parameters, as the optimizer was given them. All ranks must call it."""
    from deepspeed.utils import safe_get_full_optimizer_state  # pyright: ignore[reportMissingImports]

    inner, state = engine.optimizer.optimizer, {}
    _link_states(engine)
    flat = [inner.state[each] for each in _partitions(engine.optimizer) if inner.state.get(each)]
    for place, parameter in enumerate(chain(*groups) if flat else ()):
        state[place] = {
            # Copies: a count that all shared would be raised once for each of them.
            name: (safe_get_full_optimizer_state(parameter, name) if value.dim() else value.clone()).cpu()
            for name, value in flat[0].items()
        }
    places = iter(range(sum(map(len, groups))))
    options = [
        {**group, "params": [next(places) for _ in given]}
        for group, given in zip(inner.param_groups, groups, strict=True)
    ]
    return {"state": state, "param_groups": options}


def load_optimizer_state(engine: Any, groups: Sequence[Sequence[nn.Parameter]], kept: dict[str, Any]) -> None:
    """Put back what `optimizer_state` returned, or an optimizer of whole weights saved."""
    from deepspeed.utils import safe_set_full_optimizer_state  # pyright: ignore[reportMissingImports]

    optimizer = engine.optimizer
    inner = optimizer.optimizer
    for group, options in zip(inner.param_groups, kept["param_groups"], strict=True):
        group.update({name: value for name, value in options.items() if name != "params"})
    if not kept["state"]:
        return
    like = kept["state"][0]
    for flat in _partitions(optimizer):
        inner.state[flat] = {
            name: torch.zeros_like(flat) if value.dim() else value.clone() for name, value in like.items()
        }
    _link_states(engine)
    for place, parameter in enumerate(chain(*groups)):
        for name, value in kept["state"][place].items():
            if value.dim():
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), name)


def _link_states(engine: Any) -> None:
    """Let ZeRO-2 find each parameter's part of them; by itself it does so for the first group's alone."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() < 3 and any(map(len, optimizer.optimizer.state.values())):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _partitions(optimizer: Any) -> list[Tensor]:
    """This rank's weights, all in a row, as the optimizer inside sees them."""
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
    return next(vars(optimizer)[name] for name in names if name in vars(optimizer))
