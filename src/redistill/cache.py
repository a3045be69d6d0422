"""Key/value caches: with room for what is still to be written, so that a new token is no copy of all before it; and
with a row for each of several sequences that were read in one."""

from __future__ import annotations

from copy import copy
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 64


class RoomyLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values [B, heads, L, width] are the filled part of larger tensors.

    Whoever picks rows of them or forgets the last tokens does it as with any layer; the room is then made anew.
    """

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, layer.is_initialized
        self.dtype, self.device = layer.dtype, layer.device
        self._held: list[Tensor | None] = [None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values; returns all of them."""
        assert self.keys is not None and self.values is not None
        self.keys = self._appended(0, self.keys, key_states)
        self.values = self._appended(1, self.values, value_states)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Any) -> None:
        """Pick rows. The room is given back here, not with the next token: till then every layer would hold it."""
        self._held = [None, None]
        super().reorder_cache(beam_idx)

    def _appended(self, which: int, filled: Tensor, more: Tensor) -> Tensor:
        length, end = filled.shape[-2], filled.shape[-2] + more.shape[-2]
        held = self._held[which]
        ours = held is not None and held.untyped_storage() is filled.untyped_storage()
        if held is None or not ours or end > held.shape[-2]:
            rows, heads, _, width = filled.shape
            held = self._held[which] = filled.new_empty(rows, heads, end + ROOM, width)
            held[:, :, :length] = filled
        held[:, :, length:end] = more
        return held[:, :, :end]


def make_room(cache: Any) -> None:
    """Exchange the layers that hold every token, in place; those of a sliding window or a linear attention stay."""
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[place] = RoomyLayer(layer)


def can_be_cut(cache: Any) -> bool:
    """Whether every layer of the cache holds every token: those of a sliding window or a linear attention do not."""
    return all(type(layer) in (DynamicLayer, RoomyLayer) for layer in cache.layers)


def would_be_cut(config: PretrainedConfig) -> bool:
    """`can_be_cut` of the cache that a model of this kind makes, as far as its settings tell."""
    return can_be_cut(DynamicCache(config=config))


def pick_columns(cache: Any, columns: Tensor) -> None:
    """Lay the cache anew, in place: `columns` [B, L] are flat indices into its rows and columns, those past the last
    meaning the last."""
    for layer in cache.layers:
        layer.keys, layer.values = (_picked(each, columns) for each in (layer.keys, layer.values))


def _picked(states: Tensor, columns: Tensor) -> Tensor:
    """[R, heads, C, width] -> [B, heads, L, width]."""
    flat = states.transpose(1, 2).flatten(0, 1)
    return flat[columns.clamp(max=len(flat) - 1).to(flat.device)].transpose(1, 2)


def forked(cache: Any) -> Any:
    """A cache of the same keys and values: what one of the two appends, drops or picks, the other does not."""
    fork = copy(cache)
    fork.layers = [copy(layer) for layer in cache.layers]
    return fork
