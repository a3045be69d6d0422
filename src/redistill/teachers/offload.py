"""Weights that wait in the CPU's memory and are on the device only while they are needed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn


class Offloaded:
    """A model of the CPU that is on `device` while it reads; `head` is a copy of its output layer, which stays there.

    The weights are never changed, so they stay in the CPU's memory too, and to leave the device costs nothing.
    """

    def __init__(self, model: nn.Module, head: nn.Module, device: torch.device):
        self.head, self._device = copy.deepcopy(head).to(device), device
        self._tensors = [*chain(model.parameters(), model.buffers())]
        if device.type == "cuda":  # which reads pinned memory by itself
            for tensor in self._tensors:
                tensor.data = tensor.data.pin_memory()

    @contextmanager
    def there(self) -> Iterator[None]:
        """All weights are on the device inside."""
        homes = [tensor.data for tensor in self._tensors]
        for tensor, home in zip(self._tensors, homes, strict=True):
            tensor.data = home.to(self._device, non_blocking=True, copy=True)
        try:
            yield
        finally:
            for tensor, home in zip(self._tensors, homes, strict=True):
                tensor.data = home
