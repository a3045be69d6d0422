"""Which characters each id of a response stands for: exact, in one pass, for any tokenizer.

`decode` gives the text but not the borders, and one character can be spread over several ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from redistill.control import control_ids
from redistill.pieces import byte_of_character

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no (or not yet a) character
_PATIENCE = 8  # ids waited for until a character is complete; UTF-8 needs at most 4


def token_offsets(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """For each id the characters [start, end) of the decoded response it helps to write.

    Ids that share one character (an emoji in byte-level BPE) all have it in their ranges; control tokens and
    ids without text have an empty range. The text is `decode_response`'s; only a byte-fallback tokenizer's
    may differ, which spoils a whole run of bytes for one broken byte where this reads token after token.
    Time is linear in the number of ids.
    """
    return decoded_with_offsets(ids, tokenizer)[1]


def token_ends(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """How many characters of the decoded response are there once each id is written: what cuts the text into tokens
    without the tokenizer. A character that several ids share counts with the first; an end never moves back."""
    ends: list[int] = []
    for _, end in token_offsets(ids, tokenizer):
        ends.append(max(end, ends[-1] if ends else 0))
    return ends


def decoded_with_offsets(
    ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """The decoded response, and `token_offsets` into it."""
    from tokenizers import decoders
    from transformers import PreTrainedTokenizerFast

    control = control_ids(tokenizer)
    kept = [index for index in ids if index not in control]
    fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    if fast and isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        text, ranges = _decoded_bytes(_bytes_of(kept, tokenizer))
    else:
        text, ranges = _decoded_in_steps(kept, tokenizer)
    upcoming = iter(ranges)
    offsets: list[tuple[int, int]] = []
    here = 0
    for index in ids:
        offset = (here, here) if index in control else next(upcoming)
        offsets.append(offset)
        here = offset[1]
    return text, offsets


def _bytes_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The bytes of each token of a byte-level vocabulary."""
    byte_of = byte_of_character()
    pieces: list[bytes] = []
    for token in tokenizer.convert_ids_to_tokens(list(ids)):
        values = [byte_of.get(character) for character in token or ""]
        # An added token is stored as plain text, which may hold characters outside of the table.
        known = [value for value in values if value is not None]
        pieces.append(bytes(known) if len(known) == len(values) else token.encode())
    return pieces


def _decoded_bytes(pieces: Sequence[bytes]) -> tuple[str, list[tuple[int, int]]]:
    data = b"".join(pieces)
    text: list[str] = []
    owner: list[int] = []  # for each byte the number of its character
    done = 0
    while done < len(data):
        try:
            good, broken = data[done:].decode(), 0
        except UnicodeDecodeError as error:
            good, broken = data[done : done + error.start].decode(), error.end - error.start
        for character in good:
            owner += [len(text)] * len(character.encode())
            text.append(character)
        if broken:
            owner += [len(text)] * broken
            text.append(_REPLACEMENT)
        done = len(owner)
    ranges: list[tuple[int, int]] = []
    place = here = 0
    for piece in pieces:
        start = owner[place] if piece else here
        place += len(piece)
        here = owner[place - 1] + 1 if piece else here
        ranges.append((start, here))
    return "".join(text), ranges


def _decoded_in_steps(
    ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """For any decoder: an id is decoded after those of the last step, and waits while a character is open."""
    text = ""
    ranges: list[tuple[int, int]] = []
    context: list[int] = []
    context_text = ""
    pending: list[int] = []
    readings = [""]  # what the pending ids add to the text, after each of them
    for place, index in enumerate(ids):
        pending.append(index)
        whole = _decode(context + pending, tokenizer)
        readings.append(whole[_agreed(whole, context_text) :])
        waiting = readings[-1].endswith(_REPLACEMENT) and len(pending) < _PATIENCE
        if waiting and place + 1 < len(ids):
            continue
        agreed = [_agreed(reading, readings[-1]) for reading in readings]
        for before, after, reading in zip(agreed, agreed[1:], readings[1:], strict=False):
            # A reading that did not last ended inside a character, which this id shares with the next.
            shared = after < min(len(reading), len(readings[-1]))
            ranges.append((len(text) + before, len(text) + after + shared))
        text += readings[-1]
        context, context_text, pending, readings = pending, _decode(pending, tokenizer), [], [""]
    return text, ranges


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _agreed(one: str, other: str) -> int:
    """How many first characters are the same."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(i for i in range(shorter) if one[i] != other[i])
