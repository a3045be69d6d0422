"""Run any loss on logits slice by slice, so that logits are never held for the whole batch.

Hidden states go in, one scalar and the statistics come out. The gradients of the hidden states and of every
parameter (head, clip network) are taken inside the forward, slice by slice: no projection is computed twice,
and no slice's logits outlive it. A fused kernel may replace the inside; nothing else would notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

Stats = dict[str, Tensor]
SliceLoss = Callable[[Tensor, int], tuple[Tensor, Stats]]


def merge(parts: Sequence[Stats]) -> Stats:
    """Join the statistics of slices: scalars add up, per-token vectors are concatenated in order."""
    merged: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, value in part.items():
            merged.setdefault(name, []).append(value)
    return {
        name: torch.stack(values).sum() if values[0].dim() == 0 else torch.cat(values)
        for name, values in merged.items()
    }


def chunked(
    slice_loss: SliceLoss,
    hidden: Float[Tensor, "N H"],
    slices: Sequence[tuple[int, int]],
    parameters: Sequence[Parameter],
) -> tuple[Tensor, Stats]:
    """The sum of `slice_loss` over slices of `hidden`, with its gradients.

    slice_loss: `(hidden[start:stop], index of the slice) -> (scalar, statistics)`; it applies the head itself.
        The scalar must already be scaled (weights, token counts): its gradient is taken here.
    slices: `(start, stop)` ranges that cover what is wanted of `hidden`; positions in none get gradient 0.
    parameters: every leaf that `slice_loss` reads and that wants a gradient; none of them twice.

    Returns the scalar sum, attached to `hidden` and `parameters`, and the detached, merged statistics. Without
    grad mode, or where nothing wants a gradient, only the forward runs.
    """
    if not torch.is_grad_enabled() or not (hidden.requires_grad or parameters):
        total, stats = hidden.new_zeros((), dtype=torch.float32), []
        with torch.no_grad():
            for index, (start, stop) in enumerate(slices):
                loss, part = slice_loss(hidden[start:stop], index)
                total = total + loss
                stats.append(part)
        return total, merge(stats)
    collected: list[Stats] = []
    total = _GradientInForward.apply(slice_loss, slices, collected, tuple(parameters), hidden, *parameters)
    return total, merge(collected)


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        slice_loss: SliceLoss,
        slices: Sequence[tuple[int, int]],
        collected: list[Stats],
        parameters: tuple[Parameter, ...],
        hidden: Tensor,
        *_: Parameter,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.zeros_like(hidden)
        grads: list[Tensor | None] = [None] * len(parameters)
        for index, (start, stop) in enumerate(slices):
            with torch.enable_grad():
                part = hidden[start:stop].detach().requires_grad_()
                loss, stats = slice_loss(part, index)
                wanted = (part, *parameters)
                taken = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else ()
            total += loss.detach()
            collected.append({name: value.detach() for name, value in stats.items()})
            for place, grad in enumerate(taken):
                if grad is None:
                    continue
                if place == 0:
                    hidden_grad[start:stop] = grad
                else:
                    before = grads[place - 1]
                    grads[place - 1] = grad if before is None else before.add_(grad)
        ctx.has_grad = [grad is not None for grad in grads]
        ctx.save_for_backward(hidden_grad, *(grad for grad in grads if grad is not None))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grad_outputs
        hidden_grad, *taken = ctx.saved_tensors
        rest = iter(taken)
        grads = [next(rest) * upstream if has else None for has in ctx.has_grad]
        return (None, None, None, None, hidden_grad * upstream, *grads)
