"""Sequences of different lengths in one rectangle of ids, several in a row where the model allows it.

Where prompts of 20 and of 130 tokens are padded to one length, every layer of both models computes the padding too.
Laid one behind the other, what is left of it is the end of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from redistill.cache import would_be_cut
from redistill.models import plain_model, read_all


@dataclass(frozen=True)
class Layout:
    """input_ids: [B, L], padded on the right. position_ids: [B, L], or None where each row holds one sequence.
    first: where each sequence starts, a flat index into B * L."""

    input_ids: Tensor
    position_ids: Tensor | None
    first: tuple[int, ...]


def lay_out(sequences: Sequence[Sequence[int]], pad_id: int = 0, packed: bool = False) -> Layout:
    """A row for each sequence, or as few as can be.

    packed: put several in a row. Padding goes on counting the positions of the sequence before it, so that it is
    never read as a sequence of its own.
    """
    lengths = [len(ids) for ids in sequences]
    width = max(lengths, default=1)
    places = [(row, 0) for row in range(len(sequences))]
    if packed:
        width, places = fullest(lengths)
    rows = len({row for row, _ in places})
    input_ids = torch.full((rows, width), pad_id, dtype=torch.long)
    position_ids = torch.arange(width).repeat(rows, 1)
    for ids, (row, column) in sorted(zip(sequences, places, strict=True), key=lambda each: each[1]):
        input_ids[row, column : column + len(ids)] = torch.tensor(ids)
        position_ids[row, column:] = torch.arange(width - column)
    first = tuple(row * width + column for row, column in places)
    return Layout(input_ids, position_ids if len(places) > rows else None, first)


def fullest(lengths: Sequence[int]) -> tuple[int, list[tuple[int, int]]]:
    """Rows of which width leave least empty, from the longest sequence's to twice that; and each one's place."""
    longest, best = max(lengths, default=1), None
    for eighth in range(9):
        places = first_fit(lengths, longest + eighth * longest // 8)
        rows = 1 + max((row for row, _ in places), default=0)
        width = max((at + size for (_, at), size in zip(places, lengths, strict=True)), default=1)
        # A token's attention grows with its row: in a small model of 700 hidden units it costs at 4,096 columns as
        # much as all of the layers' products.
        cost = rows * width * (1 + width / 4096)
        if best is None or cost < best[0]:
            best = cost, width, places
    assert best is not None
    return best[1:]


def first_fit(lengths: Sequence[int], width: int) -> list[tuple[int, int]]:
    """A row and a column for each length: the longest first, each into the first row that has room for it.

    At most 11/9 of the fewest rows, and 6/9 of one more (Dosa 2007).
    """
    places, used = [(0, 0)] * len(lengths), list[int]()
    for number in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        row = next((row for row, end in enumerate(used) if end + lengths[number] <= width), len(used))
        used += [0] * (row == len(used))
        places[number] = row, used[row]
        used[row] += lengths[number]
    return places


def apart(model: nn.Module, position_ids: Tensor) -> Tensor | None:
    """[B, 1, L, L], that each sequence sees itself only, as the model's attention takes it: to be given where a cache
    is kept, since transformers then does not look for sequences in the positions."""
    inner = plain_model(model)
    like = torch.empty(*position_ids.shape, 1, dtype=inner.dtype, device=position_ids.device)
    return create_causal_mask(inner.config, like, None, None, position_ids)


@torch.no_grad()
def packs(model: nn.Module, vocabulary: int) -> bool:
    """Whether several sequences may lie in one row, told apart by their positions alone.

    Tried and not looked up, for it takes the architecture and its attention together: what lies before a sequence in
    its row must not change a bit of it, and it must be read as if it lay alone. Linear attention and flash attention
    over several rows do not do that. The same holds where the model keeps what it reads, if that can be cut. Costs
    three tiny forwards, and two more.
    """
    numbers = (torch.arange(42) * 7 + 1) % vocabulary
    sequences = [ids.tolist() for ids in numbers.split([14, 9, 8, 6, 5])]
    others = [[*reversed(ids)] for ids in sequences[:3]]
    was_training = model.training
    model.eval()
    try:
        alone = _read(model, sequences, packed=False)
        for keep in (False, True)[: 1 + would_be_cut(plain_model(model).config)]:
            found = _read(model, sequences, packed=True, keep=keep)
            moved = _read(model, others + sequences[3:], packed=True, keep=keep)
            near = torch.allclose(found, alone, rtol=2e-2, atol=2e-2 * float(alone.abs().max()))
            if not (near and torch.equal(found, moved)):
                return False
    except (TypeError, ValueError):  # no positions are taken
        return False
    finally:
        model.train(was_training)
    return True


def _read(model: nn.Module, sequences: list[list[int]], packed: bool, keep: bool = False) -> Tensor:
    """The hidden states of the last two sequences; packed, something lies before each of them."""
    layout, device = lay_out(sequences, packed=packed), plain_model(model).device
    places = [torch.arange(at, at + len(ids)) for at, ids in zip(layout.first, sequences, strict=True)]
    where = None if layout.position_ids is None else layout.position_ids.to(device)
    mask = apart(model, where) if keep and where is not None else None
    select = torch.cat(places[-2:]).to(device)
    return read_all(model, layout.input_ids.to(device), select, where, use_cache=keep, mask=mask)[0]
