"""What the engine's wrappers (DDP, FSDP2, DeepSpeed) ask of those who use the models inside them.

A wrapper acts around the `forward` of what it wraps: `through` makes any work that forward. FSDP2 and ZeRO-3 leave
each rank a part of every weight: `gathered` puts them together for a while, `whole_of` for a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any, TypeVar

from torch import Tensor, nn

from redistill import ranks, zero

Rest = TypeVar("Rest")


def refuse_engines(training: Mapping[str, Any]) -> None:
    """Raises ValueError where launcher or recipe ask for an engine under which training would go wrong.

    training: a recipe's `training` section.
    """
    from torch.distributed.fsdp import FSDPModule

    if _uses_deepspeed(training):
        _refuse_under_deepspeed(training)
    if training.get("parallelism_config") or _launched_with("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise ValueError(
            "tensor, context and sequence parallelism are not supported: use DDP (recipes/accelerate/ddp.yaml), "
            "FSDP2 (fsdp2.yaml) or DeepSpeed (zero2.yaml, zero3.yaml)."
        )
    version = os.environ.get("FSDP_VERSION", "1") if _launched_with("ACCELERATE_USE_FSDP") else None
    if training.get("fsdp"):
        version = (training.get("fsdp_config") or {}).get("version", 2)
    if version is not None and int(version) != 2:
        raise ValueError(
            f"FSDP {version} is not supported: set fsdp_version to 2 (recipes/accelerate/fsdp2.yaml)."
        )
    if version is not None and "reset_iter_state" not in dir(FSDPModule):
        raise ValueError("FSDP2 is supported from torch 2.13 on: install it, or use DDP.")


def _refuse_under_deepspeed(training: Mapping[str, Any]) -> None:
    if not zero.installed():
        raise ValueError('DeepSpeed is not installed: pip install "redistill[deepspeed]", or use FSDP2.')
    if ranks.size() == 1:
        raise ValueError("DeepSpeed is supported in runs of several processes: leave it out in this one.")
    if training.get("fp16"):
        raise ValueError(
            "training.fp16 is not supported under DeepSpeed, which scales the loss where we do not see it: "
            "use training.bf16."
        )
    if training.get("load_best_model_at_end"):
        raise ValueError(
            "training.load_best_model_at_end is not supported under DeepSpeed: take the checkpoint that "
            "trainer_state.json calls the best."
        )
    if (optim := training.get("optim", zero.OPTIMIZERS[0])) not in zero.OPTIMIZERS:
        raise ValueError(
            f"training.optim {optim} is not supported under DeepSpeed, which sees weights all in a row: "
            f"use {' or '.join(zero.OPTIMIZERS)}."
        )


def _launched_with(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"


def _uses_deepspeed(training: Mapping[str, Any]) -> bool:
    return bool(training.get("deepspeed")) or _launched_with("ACCELERATE_USE_DEEPSPEED")


def fits_whole(training: Mapping[str, Any], gather: bool) -> bool:
    """Whether each rank may hold whole models: unless they are sharded and not to be gathered (`rollout.gather`)."""
    fsdp = bool(training.get("fsdp")) or _launched_with("ACCELERATE_USE_FSDP")
    return gather or ranks.size() == 1 or not (fsdp or _uses_deepspeed(training))


def through(wrapper: nn.Module, inner: nn.Module, work: Callable[[], Tensor | None]) -> Tensor | None:
    """What `work` gives, done as the forward of `inner` inside its wrapper, whose hooks then act around it.

    DDP averages the gradients of what this returns; FSDP2 gathers weights, and scatters gradients, around the layers.
    """
    with replaced(inner, work):
        return wrapper()


@contextmanager
def replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, `forward` is the module's."""
    # In the instance, where `nn.Module.__call__` looks first; accelerate may have put its own there.
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def loss_inside(
    wrapper: nn.Module,
    student: nn.Module,
    teacher: nn.Module | None,
    work: Callable[[], tuple[Tensor, Rest]],
) -> tuple[Tensor, Rest]:
    """What `work` gives, a loss and something beside it, done inside the wrappers of both models."""
    found: list[tuple[Tensor, Rest]] = []

    def note() -> None:
        found.append(work())

    def both() -> Tensor:
        if teacher is not None and is_sharded(teacher):
            through(teacher, teacher, note)
        else:
            note()
        return found[0][0]

    if ranks.size() == 1 and not is_sharded(student):
        return work()
    loss = through(wrapper, student, both)
    assert loss is not None
    return loss, found[0][1]


def is_sharded(model: nn.Module | None) -> bool:
    """Whether FSDP2 or ZeRO-3 have left each rank a part of its weights."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule) or zero.is_partitioned(model)


def shard(model: nn.Module | None, accelerator: Any) -> None:
    """Shard a model that is not trained as accelerate shards the one that is; in place."""
    if accelerator.state.deepspeed_plugin is not None:
        zero.settle(accelerator)
        if model is not None:
            zero.partition(model, accelerator)
        return
    if model is None:
        return
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    # It notes the classes of the layers it has found, and would look for them in a model of another family.
    settings = accelerator.state.fsdp_plugin
    accelerator.state.fsdp_plugin = copy(settings)
    try:
        fsdp2_prepare_model(accelerator, model)
    finally:
        accelerator.state.fsdp_plugin = settings


@contextmanager
def gathered(*models: nn.Module | None) -> Iterator[None]:
    """Inside, every rank holds the whole of the models and can read with them by itself."""
    from torch.distributed.fsdp import FSDPModule

    sharded = [model for model in models if isinstance(model, FSDPModule)]
    held = ExitStack()
    for model in models:
        if model is not None and zero.is_partitioned(model):
            held.enter_context(zero.gathered(model))
    for model in sharded:
        # FSDP2 takes what is called first for the root of all.
        through(model, model, lambda: None)
        model.set_reshard_after_forward(False)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
    try:
        yield
    finally:
        held.close()
        for model in sharded:
            _as_in_training(model)


@contextmanager
def in_layers(model: Any) -> Iterator[None]:
    """Inside, a sharded model is in evaluation mode, and each of its forwards, in which all ranks must be, gathers
    the layers one after the other and lets them go; the head stays."""
    from torch.distributed.fsdp import FSDPModule

    in_training = [module for module in model.modules() if module.training]
    model.eval()
    by_fsdp = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if by_fsdp:
        through(model, model, lambda: None)
        for module in by_fsdp:
            module.reshard()
        _reshard_layers(model, True)
        gather_head(model.get_output_embeddings())
    try:
        yield
    finally:
        if by_fsdp:
            _as_in_training(model)
        for module in in_training:
            module.training = True


def gather_head(module: nn.Module) -> None:
    """Gather the weights of a sharded head; its own forward, which would, is not called in training."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        module.unshard()


def _as_in_training(model: Any) -> None:
    """As accelerate had it."""
    from accelerate.state import AcceleratorState

    plugin: Any = AcceleratorState().fsdp_plugin
    model.reset_iter_state()
    _reshard_layers(model, bool(plugin.reshard_after_forward))


def _reshard_layers(model: Any, reshard: bool) -> None:
    """Whether the layers give up what they gathered; the last one and the head never do."""
    model.set_reshard_after_forward(reshard)
    for module in (model, model.get_output_embeddings()):
        module.set_reshard_after_forward(False, recurse=False)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights of a sharded model by name, on the CPU; all ranks must call it. Tied ones are one tensor."""
    found: dict[int, Tensor] = {}
    named = model.state_dict(keep_vars=True)
    for value in named.values():
        if id(value) not in found:
            found[id(value)] = whole_of(value)
    return {name: found[id(value)] for name, value in named.items()}


def whole_of(value: Any) -> Any:
    """A sharded tensor, or a mapping with some, put together and on the CPU; all ranks must call it."""
    from torch.distributed.tensor import DTensor

    if isinstance(value, dict):
        return {name: whole_of(each) for name, each in value.items()}
    if not isinstance(value, Tensor):
        return value
    return (value.full_tensor().detach() if isinstance(value, DTensor) else zero.whole(value)).cpu()


def part_of(value: Any, like: Tensor) -> Any:
    """A rank's part of a whole tensor, as `like` is sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not (isinstance(value, Tensor) and isinstance(like, DTensor) and value.shape == like.shape):
        return value
    value = value.to(like.to_local().device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
