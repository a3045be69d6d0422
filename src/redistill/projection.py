"""A head while a batch goes through it, slab by slab (`losses/chunked.py:Projection`).

A plain linear head is projected into one buffer that all slabs share, and its gradients are added up in place, as a
fresh `[slab, V]` or `[V, H]` tensor for every slab takes its time too. Any other head (LoRA on it, a module of its
own) goes through autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from redistill.losses.chunked import Projection, add_up
from redistill.models import Head


def projection_of(head: Head, like: Tensor, *, trains: bool) -> Projection:
    """like: hidden states, for device and dtype. trains: whether gradients of the head's parameters are wanted."""
    linear = type(head.module) is nn.Linear
    return (_Linear if linear else _Module)(head, like, trains)


def _compute_dtype(like: Tensor) -> torch.dtype:
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


class _Base:
    def __init__(self, head: Head, like: Tensor, trains: bool):
        self.head, self.like = head, like
        self.parameters: Sequence[Parameter] = head.parameters() if trains else []

    def logits(self, projected: Tensor) -> Tensor:
        return self.head.finish(projected)

    def chain(self, logits: Tensor, by_logits: Tensor) -> Tensor:
        if self.head.softcap is not None:
            by_logits = by_logits * (1 - (logits / self.head.softcap).square())
        return by_logits if self.head.scale == 1.0 else by_logits * self.head.scale


class _Linear(_Base):
    def __init__(self, head: Head, like: Tensor, trains: bool):
        super().__init__(head, like, trains)
        assert isinstance(head.module, nn.Linear)
        self._dtype = _compute_dtype(like)
        # Cast once, not for every slab.
        self._weight = head.module.weight.detach()[: head.vocabulary].to(self._dtype)
        bias = head.module.bias
        self._bias = None if bias is None else bias.detach()[: head.vocabulary].to(self._dtype)
        self._buffer = like.new_empty(0, dtype=self._dtype)
        self._grads: dict[int, Tensor] = {}

    def project(self, hidden: Tensor) -> Tensor:
        n, size = len(hidden), len(self._weight)
        if self._buffer.numel() < n * size:
            self._buffer = self.like.new_empty(n * size, dtype=self._dtype)
        out = self._buffer[: n * size].view(n, size)
        hidden, weight = hidden.to(self._dtype), self._weight.t()
        if self._bias is None:
            return torch.mm(hidden, weight, out=out)
        return torch.addmm(self._bias, hidden, weight, out=out)

    def pull_back(self, hidden: Tensor, by_projected: Tensor) -> Tensor:
        assert isinstance(self.head.module, nn.Linear)
        for parameter in self.parameters:
            if parameter is self.head.module.weight:
                self._add(parameter, by_projected, hidden.to(self._dtype))
            else:
                grad = by_projected.sum(0, dtype=parameter.dtype)
                self._grads.setdefault(id(parameter), torch.zeros_like(parameter))[: len(grad)] += grad
        return torch.mm(by_projected, self._weight).to(hidden.dtype)

    def _add(self, weight: Parameter, by_projected: Tensor, hidden: Tensor) -> None:
        size, before = by_projected.shape[1], self._grads.get(id(weight))
        if before is None:
            grad = torch.empty_like(weight) if size == len(weight) else torch.zeros_like(weight)
            self._grads[id(weight)] = grad
            if weight.dtype == self._dtype:
                torch.mm(by_projected.t(), hidden, out=grad[:size])
            else:
                grad[:size] = by_projected.t() @ hidden
        elif weight.dtype == self._dtype:
            before[:size].addmm_(by_projected.t(), hidden)
        else:
            before[:size] += by_projected.t() @ hidden

    def gradients(self) -> Sequence[Tensor | None]:
        return [self._grads.get(id(parameter)) for parameter in self.parameters]


class _Module(_Base):
    def __init__(self, head: Head, like: Tensor, trains: bool):
        super().__init__(head, like, trains)
        self._trains = trains
        self._grads: list[Tensor | None] = [None] * len(self.parameters)

    def project(self, hidden: Tensor) -> Tensor:
        with torch.set_grad_enabled(self._trains):
            self._leaf = hidden.detach().requires_grad_(self._trains)
            self._out = self.head.module(self._leaf)[..., : self.head.vocabulary]
        return self._out.detach().clone()

    def pull_back(self, hidden: Tensor, by_projected: Tensor) -> Tensor:
        wanted = (self._leaf, *self.parameters)
        by_hidden, *taken = torch.autograd.grad(self._out, wanted, by_projected, allow_unused=True)
        add_up(self._grads, taken)
        return torch.zeros_like(hidden) if by_hidden is None else by_hidden

    def gradients(self) -> Sequence[Tensor | None]:
        return self._grads
