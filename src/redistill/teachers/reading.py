"""Responses read again as they are corrected: by a model that remembers, of each only what has changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from redistill.cache import can_be_cut, forked, pick_columns, would_be_cut
from redistill.generate import Decoding, select_rows
from redistill.models import plain_model, read_all
from redistill.packing import apart, lay_out
from redistill.sample import Sample
from redistill.teachers.signal import Signal, Teacher, picked


def read_responses(
    model: nn.Module, samples: Sequence[Sample], *, keep: bool = False, packed: bool = False
) -> tuple[Tensor, Decoding | None]:
    """Hidden states [N, H] that predict the N response tokens, sample after sample; and what was read, if `keep` and
    if it can be cut; a sequence a row then. packed: see `packing.packs`.

    Without samples one token is read all the same: of a sharded model other ranks wait for this one's part.
    """
    device = next(model.parameters()).device
    keep = keep and would_be_cut(plain_model(model).config)
    rows = [each.prompt + each.response for each in samples]
    # What follows the last token is only asked by who writes on.
    read = rows if keep else [row[:-1] for row in rows]
    layout = lay_out(read or [(0,)], packed=packed)
    select = torch.cat(
        [
            torch.arange(0),
            *(
                torch.arange(start + len(each.prompt) - 1, start + len(row) - 1)
                for start, row, each in zip(layout.first, rows, samples, strict=bool(samples))
            ),
        ]
    )
    where = None if layout.position_ids is None else layout.position_ids.to(device)
    mask = apart(model, where) if keep and where is not None else None
    hidden, cache = read_all(model, layout.input_ids.to(device), select.to(device), where, keep, mask)
    if cache is None or not can_be_cut(cache):
        return hidden, None
    lengths = torch.tensor([len(row) for row in rows], device=device)
    column = torch.arange(max(map(len, rows)), device=device)
    if where is not None:
        pick_columns(cache, torch.tensor(layout.first, device=device)[:, None] + column)
    return hidden, Decoding(cache, (column < lengths[:, None]).long(), lengths)


class Reader:
    """A model that reads the same responses again and again. packed: see `packing.packs`.

    keep: remember what was read, if that can be cut; else everything is read each time.
    """

    def __init__(self, model: nn.Module, *, packed: bool, keep: bool):
        self._model, self._packed, self._keep = model, packed, keep
        self.state: Decoding | None = None

    def read(self, samples: Sequence[Sample], rows: Sequence[int], first: Sequence[int]) -> Tensor:
        """Hidden states [n, H] that predict each response from the position `first` on, sample after sample.

        rows: which of those read last these are; up to `first` nothing of them has changed since. To be called inside
        `answering`.
        """
        if self.state is None:
            hidden, self.state = read_responses(self._model, samples, keep=self._keep, packed=self._packed)
            return hidden[behind(samples, first).to(hidden.device)] if any(first) else hidden
        state, self.state = self.state, None
        state = select_rows(state, torch.tensor(rows, device=state.position.device))
        hidden, self.state = _read_on(self._model, samples, first, state)
        return hidden

    def lend(self, last: bool) -> Decoding | None:
        """What was read, for somebody to write on from. last: nothing will be read again."""
        if self.state is None:
            return None
        state = self.state if last else replace(self.state, cache=forked(self.state.cache))
        self.state = None if last else self.state
        return state


def _read_on(
    model: nn.Module, samples: Sequence[Sample], first: Sequence[int], state: Decoding
) -> tuple[Tensor, Decoding]:
    device = state.position.device
    rows = [each.prompt + each.response for each in samples]
    # From the token on that predicts the first position.
    start = [len(each.prompt) + at - 1 for each, at in zip(samples, first, strict=True)]
    rests = [row[at:] for row, at in zip(rows, start, strict=True)]
    layout = lay_out(rests)
    ids, width = layout.input_ids.to(device), layout.input_ids.shape[1]
    select = [torch.arange(at, at + len(rest) - 1) for at, rest in zip(layout.first, rests, strict=True)]
    before, length = torch.tensor(start, device=device), torch.tensor([*map(len, rows)], device=device)
    state, column = state.cut(before), torch.arange(width, device=device)
    position = before[:, None] + column
    mask = torch.cat([state.mask, (position < length[:, None]).long()], dim=-1)
    # Padding is read at no position that the model may not have.
    position = position.minimum(length[:, None] - 1)
    hidden, cache = read_all(model, ids, torch.cat(select).to(device), position, True, mask, state.cache)
    # Close the gap between what was kept of a row and what was read behind the longest.
    kept, column = state.mask.shape[1], torch.arange(max(map(len, rows)), device=device)
    place = torch.where(column < before[:, None], column, kept + column - before[:, None])
    place += (kept + width) * torch.arange(len(rows), device=device)[:, None]
    pick_columns(cache, place)
    return hidden, Decoding(cache, (column < length[:, None]).long(), length)


def behind(samples: Sequence[Sample], first: Sequence[int]) -> Tensor:
    """Which of the response positions of all samples come at `first` or later in theirs."""
    places = torch.arange(sum(len(each.response) for each in samples))
    parts = places.split([len(each.response) for each in samples])
    return torch.cat([places[:0], *(part[at:] for part, at in zip(parts, first, strict=True))])


class SignalReader(Protocol):
    """What a teacher says of the same responses, again and again."""

    def read(self, samples: Sequence[Sample], rows: Sequence[int], first: Sequence[int]) -> Signal:
        """As `Reader.read`, its signal."""
        ...


class Whole:
    """Of a teacher that remembers nothing."""

    def __init__(self, teacher: Teacher):
        self._teacher = teacher

    def read(self, samples: Sequence[Sample], rows: Sequence[int], first: Sequence[int]) -> Signal:
        """See `SignalReader`."""
        del rows
        signal = self._teacher.signal(samples)
        return picked(signal, behind(samples, first)) if any(first) else signal
