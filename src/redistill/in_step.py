"""Reading with models whose weights stay sharded: all ranks in step, forward by forward.

A forward of a sharded model gathers its layers one after the other, and every rank must be in it. Here each rank says
before its forward which model it wants to read with, and all of them read with every model that one of them wants:
who wants another, or has nothing left to read, reads one token for nothing. So each rank may read as often as it
likes, in whatever order, and gets what it would get alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from redistill import ranks
from redistill.models import plain_model
from redistill.wrapped import gathered, in_layers, is_sharded, replaced


def readable(*models: nn.Module | None, gather: bool) -> AbstractContextManager[None]:
    """Inside, every rank can read with the models by itself, until it comes to where all ranks meet.

    gather: each rank holds the whole of them meanwhile; otherwise their layers come together in each forward, for
    which all ranks are needed.
    """
    return gathered(*models) if gather else _in_step(*models)


@contextmanager
def _in_step(*models: nn.Module | None) -> Iterator[None]:
    sharded = [model for model in models if model is not None and is_sharded(model)]
    if not sharded:
        yield
        return
    with ExitStack() as held:
        for model in sharded:
            held.enter_context(in_layers(model))
        decoders = [plain_model(model).base_model for model in sharded]
        reading = _Reading([decoder.forward for decoder in decoders], plain_model(sharded[0]).device)
        for place, decoder in enumerate(decoders):
            held.enter_context(replaced(decoder, partial(reading.forward, place)))
        with ranks.before_meeting(reading.help):
            yield
            reading.help()


class _Reading:
    """One rank's part in the forwards of all. forwards: of the models' decoders."""

    def __init__(self, forwards: list[Callable[..., Any]], device: torch.device):
        self._forwards, self._device = forwards, device

    def forward(self, place: int, *args: Any, **options: Any) -> Any:
        """That of a decoder, in step with the other ranks."""
        found = None
        for each in ranks.wanted_by_any(place, len(self._forwards)):
            if each == place:
                found = self._forwards[each](*args, **options)
            else:
                self._read_for_nothing(each)
        return found

    def help(self) -> None:
        """Take part until no rank has anything left to read."""
        while wanted := ranks.wanted_by_any(None, len(self._forwards)):
            for each in wanted:
                self._read_for_nothing(each)

    @torch.no_grad()
    def _read_for_nothing(self, place: int) -> None:
        ids = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        self._forwards[place](input_ids=ids, use_cache=False)
