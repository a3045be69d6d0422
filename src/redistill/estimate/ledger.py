"""The bytes that tensors hold while code runs, by what they are for, phase by phase; and the arithmetic of it.

Inside torch's `FakeTensorMode` tensors have shapes, dtypes and storages but no memory, and every line of a model or
of the training runs as it always does. So what is counted is this program itself and not a rule about it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from redistill.meters import flop_formulas

Parts = dict[str, int]


@dataclass(frozen=True)
class Account:
    """Of a phase: the parts when they were the most, in each of the stretches it was split into; and the operations
    of its matrix products, by who computed."""

    stretches: tuple[Parts, ...]
    flops: Counter[str]


class Ledger(TorchDispatchMode):
    """Notes each storage that an operation makes, once and under `part`, until nobody holds it any more.

    held: bytes by part now. A storage counts whole as long as any view of it lives, as an allocator sees it. What an
    operation needs inside itself, and rounding of sizes by an allocator, is not counted. flops: as `meters.Flops`
    counts them, by `who`, since the phase began. accounts: of the phases that have ended, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part, self.who = "activations", "student"
        self.held: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.accounts: dict[str, Account] = {}
        self._known: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._stretches: list[Parts] = []
        self._most: Parts = {}
        self._formulas = flop_formulas()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if formula := self._formulas.get(func.overloadpacket):
            self.flops[self.who] += formula(*args, **kwargs, out_val=made)
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                self._note(each)
        return made

    @contextmanager
    def phase(self, name: str, times: int = 1) -> Iterator[None]:
        """What happens inside is this phase, which a step has `times` times."""
        self.begin()
        yield
        self.end(name, times)

    def begin(self) -> None:
        """A phase begins."""
        self.flops, self._stretches, self._most = Counter(), [], {}
        self._look()

    def split(self) -> None:
        """A new stretch of the phase begins."""
        self._stretches.append(self._most)
        self._most = {}
        self._look()

    def end(self, name: str, times: int = 1) -> None:
        """The phase has ended, and another begins; one that was there before goes on with it."""
        self.split()
        before = self.accounts.get(name, Account((), Counter()))
        flops = Counter({who: times * count for who, count in self.flops.items()})
        self.accounts[name] = Account((*before.stretches, *self._stretches), before.flops + flops)
        self.begin()

    @contextmanager
    def noting(self, part: str) -> Iterator[None]:
        """What is made inside is for `part`."""
        before, self.part = self.part, part
        yield
        self.part = before

    def move(self, tensors: Iterable[Tensor], part: str) -> None:
        """These are for `part` from now on."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._known:
                reference, old, size = self._known[key]
                self._known[key] = reference, part, size
                self.held[old] -= size
                self.held[part] += size

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._gone(key)), self.part, size
        self.held[self.part] += size
        self._look()

    def _gone(self, key: int) -> None:
        _, part, size = self._known.pop(key)
        self.held[part] -= size

    def _look(self) -> None:
        if self.held.total() > sum(self._most.values()):
            self._most = {part: size for part, size in self.held.items() if size}
