"""Linear layers of a model on a CPU, their weights laid out as oneDNN multiplies with them.

To lay them out takes longer than a product with few rows, such as those of a decode step; `F.linear` does it in every
call, or goes without. Here it is done once for many. On other devices, and for other kinds of layer, nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from redistill.wrapped import replaced

# The layout hardly depends on it.
_ROWS = 16


@contextmanager
def prepacked(*models: nn.Module) -> Iterator[None]:
    """Inside, the models' linear layers multiply with such copies of their weights wherever no gradient is wanted:
    the same up to rounding. The weights must not change meanwhile. The copies are there besides; inside another
    `prepacked` none is made.
    """
    with ExitStack() as held:
        if found := operators():
            for model in models:
                for layer in linear_layers(model):
                    held.enter_context(replaced(layer, _forward(layer, *found)))
        yield


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers that `prepacked` acts on: plain ones, with the whole of their weight, on a CPU."""
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
        # FSDP2 gives a module a class of its own, which computes as before; accelerate's hooks and we a forward.
        and type(layer).forward is nn.Linear.forward
        and "forward" not in vars(layer)
        and _is_whole(layer)
        and _multiplies(computed(layer.weight))
    ]


def operators() -> tuple[Any, Any] | None:
    """What lays a weight out and what multiplies with it, which are not public: None where this torch has no such."""
    ours = torch.ops.mkldnn
    try:
        lay_out, multiply, _ = (
            ours._reorder_linear_weight,
            ours._linear_pointwise,
            ours._is_mkldnn_bf16_supported,
        )
    except AttributeError:
        return None
    return (lay_out, multiply) if torch.backends.mkldnn.is_available() else None


def _is_whole(layer: nn.Linear) -> bool:
    weight = layer.weight
    plain = type(weight.data) is Tensor and weight.layout == torch.strided and weight.device.type == "cpu"
    return plain and weight.shape == (layer.out_features, layer.in_features)


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies numbers of this format here."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def computed(like: Tensor) -> torch.dtype:
    """The format in which a linear layer computes on a CPU."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else like.dtype


def _forward(
    layer: nn.Linear, lay_out: Callable[..., Tensor], multiply: Callable[..., Tensor]
) -> Callable[[Tensor], Tensor]:
    dtype = computed(layer.weight)
    weight = lay_out(layer.weight.detach().to(dtype).contiguous(), _ROWS)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(input: Tensor) -> Tensor:
        if torch.is_grad_enabled() or computed(input) != dtype:
            return nn.Linear.forward(layer, input)
        return multiply(input.to(dtype), weight, bias, "none", [], "")

    return forward
