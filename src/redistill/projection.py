"""A head while a batch goes through it, slab by slab (`losses/chunked.py:Projection`).

A plain linear head is projected into one buffer that all slabs share, and its gradients are added up in place, as a
fresh `[slab, V]` or `[V, H]` tensor for every slab takes its time too. Any other head (LoRA on it, a module of its
own) goes through autograd.

A 16-bit head (bfloat16, float16, autocast) gives logits in fp32, and takes their gradient so: products are summed in
fp32 anyway, and in bfloat16 a logit near 20 is off by up to 0.06. A GPU multiplies 16-bit numbers into fp32 (from
torch 2.8); torch on a CPU does not, so there pieces of the head are widened in turn. Other heads round as they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from redistill.losses.chunked import Projection, Source, add_up
from redistill.models import Head
from redistill.teachers.signal import Hidden, Signal, TopK

# Elements of a head that are widened, or of its gradient that are made, at once.
_PIECE = 2**23


def projection_of(head: Head, like: Tensor, *, trains: bool, exact: bool = True) -> Projection:
    """like: hidden states, for device and dtype. trains: whether gradients of the head's parameters are wanted.
    exact: logits of 16-bit heads, and their gradients, are fp32; otherwise 16 bits like the head."""
    # FSDP2 gives a module a class of its own, which computes as before.
    linear = isinstance(head.module, nn.Linear) and type(head.module).forward is nn.Linear.forward
    return (_Linear if linear else _Module)(head, like, trains, exact)


def source_of(signal: Signal, device: torch.device, *, exact: bool = True) -> Source:
    """A teacher's signal as the loss reads it on `device`. exact: see `projection_of`."""
    if not isinstance(signal, Hidden):
        return _Given(signal.to(device))
    projection = projection_of(signal.head, signal.hidden, trains=False, exact=exact)
    return _Projected(projection, signal.hidden, device)


class _Projected:
    """Logits of hidden states. The model may lie elsewhere than the loss."""

    def __init__(self, projection: Projection, hidden: Tensor, device: torch.device):
        self._projection, self._hidden, self._device = projection, hidden, device

    def slab(self, rows: slice) -> Tensor:
        return self._projection.project(self._hidden[rows])

    def block(self, slab: Tensor, rows: slice) -> Tensor:
        return self._projection.logits(slab[rows]).to(self._device)


class _Given:
    """What is there already."""

    def __init__(self, signal: Tensor | TopK):
        self._signal = signal

    def slab(self, rows: slice) -> Tensor | TopK:
        return self._signal[rows]

    def block(self, slab: Tensor | TopK, rows: slice) -> Tensor | TopK:
        return slab[rows]


def _compute_dtype(like: Tensor) -> torch.dtype:
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def _multiplies_16_bits(like: Tensor) -> bool:
    """Whether the device has products of 16-bit numbers that come in fp32."""
    return like.device.type == "cuda"


def _times(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mm(a, b) if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype)


def _narrowed(by: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """`by` in another dtype, and what a product with it is to be multiplied by. It may be overwritten.

    The largest becomes 2^13 or more, by a power of 2, where the dtype has fewer bits: a gradient that is divided by
    thousands of tokens would vanish in float16.
    """
    if dtype.itemsize >= by.dtype.itemsize:
        return by.to(dtype), 1.0
    peak = torch.linalg.vector_norm(by, ord=torch.inf).clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.exp2(peak.log2().floor() - 13)
    return by.div_(scale).to(dtype), scale


class _Base:
    def __init__(self, head: Head, like: Tensor, trains: bool, exact: bool):
        self.head, self.like = head, like
        self.parameters: Sequence[Parameter] = head.parameters() if trains else []
        computed = _compute_dtype(like)
        self._wide = torch.promote_types(computed, torch.float32) if exact else computed
        self._dtype = computed if _multiplies_16_bits(like) else self._wide

    def logits(self, projected: Tensor) -> Tensor:
        return self.head.finish(projected)

    def chain(self, logits: Tensor, by_logits: Tensor) -> Tensor:
        if self.head.softcap is not None:
            by_logits = by_logits * (1 - (logits / self.head.softcap).square())
        return by_logits if self.head.scale == 1.0 else by_logits * self.head.scale


class _Linear(_Base):
    """Operands of `_dtype`, products of `_wide`."""

    def __init__(self, head: Head, like: Tensor, trains: bool, exact: bool):
        super().__init__(head, like, trains, exact)
        assert isinstance(head.module, nn.Linear)
        weight, bias = head.module.weight.detach()[: head.vocabulary], head.module.bias
        # Narrowed once, not for every slab. Widened piece by piece: a second head of twice the size is too much.
        self._weight = weight if weight.dtype.itemsize < self._dtype.itemsize else weight.to(self._dtype)
        self._bias = None if bias is None else bias.detach()[: head.vocabulary].to(self._wide)
        self._buffer = like.new_empty(0, dtype=self._wide)
        self._grads: dict[int, Tensor] = {}

    def project(self, hidden: Tensor) -> Tensor:
        n, size = len(hidden), len(self._weight)
        if self._buffer.numel() < n * size:
            self._buffer = self.like.new_empty(n * size, dtype=self._wide)
        out, hidden = self._buffer[: n * size].view(n, size), hidden.to(self._dtype)
        for rows, weight in self._pieces():
            if self._dtype == self._wide:
                torch.mm(hidden, weight.t(), out=out[:, rows])
            else:
                torch.mm(hidden, weight.t(), self._wide, out=out[:, rows])
        return out if self._bias is None else out.add_(self._bias)

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Runs of the head's rows, as operands."""
        size, width = self._weight.shape
        step = size if self._weight.dtype == self._dtype else _rows_of_a_piece(width)
        for start in range(0, size, step):
            rows = slice(start, min(start + step, size))
            yield rows, self._weight[rows].to(self._dtype)

    def pull_back(self, hidden: Tensor, by_projected: Tensor) -> Tensor:
        assert isinstance(self.head.module, nn.Linear)
        for parameter in self.parameters:
            if parameter is not self.head.module.weight:
                grad = by_projected.sum(0, dtype=self._wide)
                sums = self._grads.setdefault(id(parameter), torch.zeros_like(parameter, dtype=self._wide))
                sums[: len(grad)] += grad
        by, scale = _narrowed(by_projected, self._dtype)
        for parameter in self.parameters:
            if parameter is self.head.module.weight:
                self._add(parameter, by, hidden.to(self._dtype), scale)
        products = [_times(by[:, rows], weight, self._wide) for rows, weight in self._pieces()]
        return sum(products[1:], start=products[0]).mul_(scale)

    def _add(self, weight: Parameter, by: Tensor, hidden: Tensor, scale: Tensor | float) -> None:
        size, before = by.shape[1], self._grads.get(id(weight))
        if weight.dtype == self._dtype == self._wide and before is not None:
            before[:size].addmm_(by.t(), hidden)
            return
        grad = before
        if grad is None:
            grad = torch.empty_like(weight) if size == len(weight) else torch.zeros_like(weight)
            self._grads[id(weight)] = grad
        if weight.dtype == self._dtype == self._wide:
            torch.mm(by.t(), hidden, out=grad[:size])
            return
        step = _rows_of_a_piece(hidden.shape[1])
        for start in range(0, size, step):
            rows = slice(start, min(start + step, size))
            more = _times(by[:, rows].t(), hidden, self._wide).mul_(scale)
            grad[rows] = more if before is None else more.add_(grad[rows])

    def gradients(self) -> Sequence[Tensor | None]:
        taken = [(parameter, self._grads.get(id(parameter))) for parameter in self.parameters]
        return [None if grad is None else grad.to(parameter.dtype) for parameter, grad in taken]


def _rows_of_a_piece(width: int) -> int:
    return max(1, _PIECE // width)


class _Module(_Base):
    """Of `_wide` is what the module gives, not what it computes in."""

    def __init__(self, head: Head, like: Tensor, trains: bool, exact: bool):
        super().__init__(head, like, trains, exact)
        self._trains, self._autocast = trains, torch.is_autocast_enabled(like.device.type)
        self._grads: list[Tensor | None] = [None] * len(self.parameters)

    def project(self, hidden: Tensor) -> Tensor:
        computed = torch.get_autocast_dtype(hidden.device.type)
        autocast = torch.autocast(hidden.device.type, computed, enabled=self._autocast)
        with torch.set_grad_enabled(self._trains), autocast:
            self._leaf = hidden.detach().requires_grad_(self._trains)
            self._out = self.head.module(self._leaf)[..., : self.head.vocabulary]
        return self._out.detach().to(self._wide, copy=True)

    def pull_back(self, hidden: Tensor, by_projected: Tensor) -> Tensor:
        wanted = (self._leaf, *self.parameters)
        by, scale = _narrowed(by_projected, self._out.dtype)
        by_hidden, *taken = torch.autograd.grad(self._out, wanted, by, allow_unused=True)
        # Not in place: two of them may be one tensor.
        add_up(self._grads, [None if grad is None else grad * scale for grad in taken])
        return torch.zeros_like(hidden) if by_hidden is None else by_hidden.to(self._wide) * scale

    def gradients(self) -> Sequence[Tensor | None]:
        return self._grads
