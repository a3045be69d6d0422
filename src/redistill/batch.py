"""Rows of token ids -> one batch: which positions are trained on, what they predict, and which terms look at them.

Everything after the model works on `N` flat response positions: position `i` is where the model, having read
`input_ids` up to there, predicts `targets[i]`. Rows come in three groups, in this order: those only
distilled on (the student's own answers), those distilled on and fitted (references), those only fitted
(references whose place a student's answer took). So a slice of positions never mixes groups, and the
teacher reads only the rows of the first two.

Phrases are not needed to read, so a batch is without them: `mark` asks for them once the models are at work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict, cast

import torch
from torch import Tensor

from redistill.packing import lay_out
from redistill.sample import Sample

# Positions in a slice as a batch is cut; whoever goes through them may join neighbours.
SLICE = 8
# Gives one number per response token, -1 outside every phrase, or () where there is none; may wait until it is found.
Spans = Callable[[], Sequence[int]]


def no_spans() -> tuple[int, ...]:
    """Of a response without phrases."""
    return ()


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence to train on, and which terms look at it; spans are only asked for where `distill`."""

    sample: Sample
    sft: bool
    distill: bool
    spans: Spans = no_spans


class Counts(NamedTuple):
    """What each term's sum is divided by, over the whole optimizer step and all ranks."""

    sft: float
    token: float
    span: float


class Slice(NamedTuple):
    """A run of response positions of one group; spans never cross its ends."""

    start: int
    stop: int
    sft: bool
    distill: bool


class Marks(NamedTuple):
    """spans: [N], -1 outside every phrase. slices: cover the N positions in order."""

    spans: Tensor
    slices: tuple[Slice, ...]


class Batch(TypedDict):
    """input_ids, position_ids: [B, L], see `Layout`. select: [N] flat indices into B * L.
    targets: [N]. behaviour, advantages: [N], see `Sample`; 0 where a sample has none. rows: what the positions
    belong to, one after the other. distilled, distill_positions: how many of `rows` and of the N positions, counted
    from the first, the teacher reads."""

    input_ids: Tensor
    position_ids: Tensor | None
    select: Tensor
    targets: Tensor
    behaviour: Tensor
    advantages: Tensor
    distilled: int
    distill_positions: int
    rows: tuple[Row, ...]


def count(rows: Sequence[Row]) -> Counts:
    """Tokens that are fitted, tokens that are distilled on, and phrases of two tokens or more in the latter (which it
    waits for)."""
    sft = sum(len(row.sample.response) for row in rows if row.sft)
    token = sum(len(row.sample.response) for row in rows if row.distill)
    span = sum(_spans_with_a_pair(row.spans()) for row in rows if row.distill)
    return Counts(sft, token, span)


def _spans_with_a_pair(spans: Sequence[int]) -> int:
    return len({a for a, b in zip(spans, spans[1:], strict=False) if a == b and a >= 0})


def split_by_length(rows: Sequence[Row], parts: int) -> list[list[Row]]:
    """`parts` groups of rows of similar length, as even in number as can be: little of a batch is padding."""
    ordered = sorted(rows, key=lambda row: len(row.sample.prompt) + len(row.sample.response))
    edges = [round(part * len(ordered) / parts) for part in range(parts + 1)]
    return [ordered[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]


def collate(rows: Sequence[Row], pad_id: int, packed: bool = False) -> Batch:
    """`rows` as one batch; those with an empty response or no term are left out.

    packed: lay several rows into one of the batch (see `packing.packs`).
    """
    rows = [row for row in rows if row.sample.response and (row.sft or row.distill)]
    rows = sorted(rows, key=lambda row: (not row.distill, row.sft))
    distilled = sum(row.distill for row in rows)
    # The last response token predicts nothing that is trained on, so it is not read.
    read = [(row.sample.prompt + row.sample.response)[:-1] for row in rows]
    # Without a row there is still something to read: other ranks wait for this one's forward.
    layout = lay_out(read or [(pad_id,)], pad_id, packed)
    select: list[int] = []
    targets: list[int] = []
    behaviour: list[float] = []
    advantages: list[float] = []
    for row, start in zip(rows, layout.first, strict=bool(rows)):
        assert row.sample.prompt, "a row needs a prompt of one token or more to predict from"
        first = start + len(row.sample.prompt) - 1
        select.extend(range(first, first + len(row.sample.response)))
        targets.extend(row.sample.response)
        nothing = (0.0,) * len(row.sample.response)
        behaviour.extend(row.sample.behaviour or nothing)
        advantages.extend(row.sample.advantages or nothing)
    return Batch(
        input_ids=layout.input_ids,
        position_ids=layout.position_ids,
        select=torch.tensor(select, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        behaviour=torch.tensor(behaviour, dtype=torch.float32),
        advantages=torch.tensor(advantages, dtype=torch.float32),
        distilled=distilled,
        distill_positions=sum(len(row.sample.response) for row in rows[:distilled]),
        rows=tuple(rows),
    )


def mark(batch: Batch, slice_size: int = SLICE) -> Marks:
    """The phrases of a batch, which it waits for, and its positions cut between them.

    slice_size: the most positions in one slice, exceeded only where one phrase is longer.
    """
    spans: list[int] = []
    groups: list[tuple[int, bool, bool]] = []
    for row in batch["rows"]:
        offset, length = len(spans), len(row.sample.response)
        found = (row.distill and row.spans()) or [-1] * length
        assert len(found) == length, "spans have a number for each token"
        spans.extend(offset + number if number >= 0 else -1 for number in found)
        groups.append((len(spans), row.sft, row.distill))
    # Without waiting for the device, which is at work on what it was given to read.
    numbers = torch.tensor(spans, dtype=torch.long).to(batch["targets"].device, non_blocking=True)
    return Marks(numbers, tuple(_slices(groups, spans, slice_size)))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch with its tensors on `device`."""
    moved = {
        name: value.to(device, non_blocking=True)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
    return cast(Batch, batch | moved)


def joined(slices: Sequence[Slice], size: int) -> list[Slice]:
    """Neighbouring slices of one group as one, as long as it has at most `size` positions."""
    found: list[Slice] = []
    for each in slices:
        last = found[-1] if found else None
        if last is not None and last[2:] == each[2:] and each.stop - last.start <= size:
            found[-1] = last._replace(stop=each.stop)
        else:
            found.append(each)
    return found


def _slices(groups: list[tuple[int, bool, bool]], spans: list[int], size: int) -> list[Slice]:
    slices: list[Slice] = []
    start = 0
    for place, (end, sft, distill) in enumerate(groups):
        if place + 1 < len(groups) and groups[place + 1][1:] == (sft, distill):
            continue
        while start < end:
            stop = min(start + size, end)
            while stop < end and stop > start + 1 and spans[stop] == spans[stop - 1] >= 0:
                stop -= 1
            if stop == start + 1 and size > 1:  # one phrase fills the slice: take it whole
                stop = min(start + size, end)
                while stop < end and spans[stop] == spans[stop - 1] >= 0:
                    stop += 1
            slices.append(Slice(start, stop, sft, distill))
            start = stop
    return slices
