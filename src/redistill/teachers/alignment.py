"""Two tokenizers over one text: where both have a border, and which ids of one an id of the other is.

Read by `aligned.py`; no probabilities here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from redistill.control import TemplateRefusal
from redistill.pieces import Piece, Pieces

# Ids of ours that are known of one of theirs.
WIDTH = 8


@dataclass(frozen=True)
class Group:
    """The shortest runs of ids, `ours` [start, stop) and `theirs` likewise, that write the same."""

    ours: tuple[int, int]
    theirs: tuple[int, int]


@dataclass(frozen=True)
class Aligned:
    """theirs: the ids in which the other tokenizer has the response. groups: in order, not all of the response."""

    theirs: tuple[int, ...]
    groups: tuple[Group, ...]


def align(ids: Sequence[int], ours: Pieces, theirs: Pieces) -> Aligned:
    """A response of our ids as theirs.

    Left out of the groups: what is no UTF-8 (an answer cut within a character), the last group of a response without
    its end (its last word may go on, and so be other ids), and all behind something that they cannot write: a control
    token that they lack, or a text that their tokenizer changes.
    """
    pieces = ours.of(ids)
    found, written, broken = _translated(pieces, theirs)
    mine, other = _units(pieces), _units(written)
    same = next((at for at, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), None)
    same = min(len(mine), len(other)) if same is None else same
    groups = []
    for group, start, stop in _groups(pieces, written):
        whole = stop <= same and not any(start < end and begin < stop for begin, end in broken)
        open_end = stop == len(mine) and not isinstance(pieces[group.ours[1] - 1], str)
        if whole and not open_end:
            groups.append(group)
    read = groups[-1].theirs[1] if groups else 0
    return Aligned(tuple(found[:read]), tuple(groups))


def _translated(
    pieces: Sequence[Piece], theirs: Pieces
) -> tuple[list[int], list[Piece], list[tuple[int, int]]]:
    """Their ids, what each writes, and the runs of units [start, end) that are no UTF-8; up to what they lack."""
    found: list[int] = []
    written: list[Piece] = []
    broken: list[tuple[int, int]] = []
    done, text = 0, b""
    for piece in (*pieces, None):
        if isinstance(piece, bytes):
            text += piece
            continue
        for part, is_text in _parts(text):
            more = _encoded(part, theirs, not found) if is_text else _bytewise(part, theirs)
            if more is None:
                return found, written, broken
            written += theirs.of(more) if not found and is_text else [theirs.written[index] for index in more]
            found += more
            if not is_text:
                broken.append((done, done + len(part)))
            done += len(part)
        text = b""
        if piece is None or piece not in theirs.named:
            break
        found.append(theirs.named[piece])
        written.append(piece)
        done += 1
    return found, written, broken


def _parts(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """Runs that are UTF-8, and those that are not."""
    while data:
        try:
            data.decode()
            good, bad = len(data), len(data)
        except UnicodeDecodeError as error:
            good, bad = error.start, error.end
        if good:
            yield data[:good], True
        if bad > good:
            yield data[good:bad], False
        data = data[bad:]


def _encoded(data: bytes, theirs: Pieces, first: bool) -> list[int] | None:
    try:
        return theirs.encoded(data.decode(), first=first)
    except TemplateRefusal:  # a typed control token that theirs cannot write otherwise
        return None


def _bytewise(data: bytes, theirs: Pieces) -> list[int] | None:
    ids = [theirs.single.get(byte) for byte in data]
    known = [index for index in ids if index is not None]
    return known if len(known) == len(ids) else None


def _units(pieces: Sequence[Piece]) -> list[int | str]:
    """Bytes, and control tokens as one unit each; up to the first piece of which nothing is known."""
    units: list[int | str] = []
    for piece in pieces:
        if piece is None:
            break
        units += piece if isinstance(piece, bytes) else [piece]
    return units


def _groups(ours: Sequence[Piece], theirs: Sequence[Piece]) -> Iterator[tuple[Group, int, int]]:
    """With the units [start, stop) of each."""
    ends = [list(accumulate(_length(piece) for piece in pieces)) for pieces in (ours, theirs)]
    mine, other = ends
    a = b = begin_a = begin_b = start = 0
    while a < len(mine) and b < len(other):
        if mine[a] == other[b]:
            yield Group((begin_a, a + 1), (begin_b, b + 1)), start, mine[a]
            start, begin_a, begin_b = mine[a], a + 1, b + 1
            a, b = a + 1, b + 1
        elif mine[a] < other[b]:
            a += 1
        else:
            b += 1


def _length(piece: Piece) -> int:
    return len(piece) if isinstance(piece, bytes) else 1


def codes_of(ours: Pieces, theirs: Pieces, size: int, their_size: int, *, first: bool) -> Tensor:
    """[their_size, WIDTH] int64: of each of their ids what it writes as ids of ours, `size` behind the last, and
    nothing else where it is not known.

    Ids that write the same bytes belong together, and control tokens of one name. Any other text is as our tokenizer
    writes it behind something. first: at the beginning of a response, where a border is no blank.
    """
    bordered = first and ours.bordered
    written = [ours.unbordered(piece) if first else piece for piece in ours.written[:size]]
    same: dict[Piece, int] = {}
    for index in sorted(range(len(written)), key=lambda each: _rank(ours, each, bordered)):
        same.setdefault(written[index], index)
    same |= {name: index for name, index in ours.named.items() if index < size}
    alike = not first or ours.bordered == theirs.bordered
    numbers = {token: index for index, token in enumerate(ours.tokens) if token is not None}
    found: dict[int, list[int]] = {}
    rest: list[tuple[int, str]] = []
    for index, token in enumerate(theirs.tokens[:their_size]):
        piece = theirs.unbordered(theirs.written[index]) if first else theirs.written[index]
        if not piece:
            continue
        # Of several ids that write the same, the one of the same name.
        equal = numbers.get(token or "", size) if alike else size
        if equal < size and ours.written[equal] == theirs.written[index]:
            found[index] = [equal]
        elif piece in same:
            found[index] = [same[piece]]
        elif isinstance(piece, bytes) and (text := _text(piece)) is not None:
            rest.append((index, text))
    border = " " if bordered else ""
    for (index, _), ids in zip(rest, ours.many([border + text for _, text in rest]), strict=True):
        if ids and max(ids) < size:
            found[index] = ids[:WIDTH]
    rows = [found.get(index, []) for index in range(their_size)]
    return torch.tensor([ids + [size] * (WIDTH - len(ids)) for ids in rows])


def _rank(pieces: Pieces, index: int, bordered: bool) -> tuple[bool, bool]:
    """Of ids that write the same, which is meant: at the beginning of a response the one with a border, and anywhere
    rather not the one that stands for a byte without a token."""
    token, piece = pieces.tokens[index], pieces.written[index]
    spare = token is not None and len(token) == 6 and token.startswith("<0x")
    return bordered and not (isinstance(piece, bytes) and piece[:1] == b" "), spare


def _text(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None
