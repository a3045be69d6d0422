"""What each id of a tokenizer writes, as bytes, and bytes as ids: the ground on which two tokenizers meet.

For byte-level BPE and for SentencePiece as the fast tokenizers have them. Control tokens write no text; they go by a
name: `END` for the one that ends a response, else their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from redistill.chat import Template, end_id, response_ids
from redistill.control import control_ids, control_pattern, hide, ids_with_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Text; the name of a control token; nothing that is known.
Piece = bytes | str | None
END, EOS = "end of response", "end of text"
_WORD_BORDER = "\u2581"
_ANCHOR = "\n"


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's table, by which a byte-level vocabulary writes every byte as a visible character: those of Latin-1 that
    can be seen as themselves, the other 68 in order from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    byte_of = {chr(value): value for value in visible}
    return byte_of | {chr(0x100 + n): value for n, value in enumerate(sorted(set(range(256)) - visible))}


class Pieces:
    """The ids of `tokenizer`, whose responses are closed as `template` has it.

    written: of each id what it writes. named: the control token of each name.
    Errors: ValueError for a tokenizer whose ids do not each stand for some bytes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template):
        self.tokenizer = tokenizer
        self._template: Template = template
        table = tokenizer.get_vocab()
        self.tokens: list[str | None] = [None] * (max(table.values()) + 1)
        for token, index in table.items():
            self.tokens[index] = token
        self.named = self._control_names()
        writes, added = _writer(tokenizer), tokenizer.added_tokens_decoder
        self.written: list[Piece] = [
            None if token is None else writes(token, index in added)
            for index, token in enumerate(self.tokens)
        ]
        for index in control_ids(tokenizer):
            self.written[index] = None
        for name, index in self.named.items():
            self.written[index] = name if self.written[index] is None else self.written[index]
        self._hidden = control_pattern(tokenizer)
        # Whether a response's first word is written with a border that is no blank of its text.
        first = self.written[response_ids("a", tokenizer, template=template)[0]]
        self.bordered = isinstance(first, bytes) and first[:1] == b" "

    def _control_names(self) -> dict[str, int]:
        end, eos = end_id(self.tokenizer, self._template), self.tokenizer.eos_token_id
        named = {END: end}
        if isinstance(eos, int):
            named[EOS] = eos
        others = sorted(control_ids(self.tokenizer) - {*named.values()})
        return named | {str(self.tokens[index]): index for index in others if self.tokens[index] is not None}

    @cached_property
    def single(self) -> dict[int, int]:
        """The id that writes one byte and no more."""
        found: dict[int, int] = {}
        for index, piece in enumerate(self.written):
            if isinstance(piece, bytes) and len(piece) == 1:
                found.setdefault(piece[0], index)
        return found

    def of(self, ids: Sequence[int]) -> list[Piece]:
        """What the ids of a whole response write."""
        pieces = [self.written[index] if index < len(self.written) else None for index in ids]
        if pieces and self.bordered:
            pieces[0] = self.unbordered(pieces[0])
        return pieces

    def unbordered(self, piece: Piece) -> Piece:
        """What a response's first id writes there."""
        return piece[1:] if self.bordered and isinstance(piece, bytes) and piece[:1] == b" " else piece

    def encoded(self, text: str, *, first: bool) -> list[int]:
        """The ids of `text`, typed control tokens as text: at the beginning of a response if `first`, else as what
        follows on something. They may write another text: a tokenizer may change it."""
        if first:
            return list(response_ids(text, self.tokenizer, template=self._template))[:-1]
        hidden: dict[str, int] = {}
        shown = hide(text, self._hidden, hidden)
        ids = ids_with_hidden(shown, hidden, self.tokenizer)
        if self.joined(ids) == text.encode():
            return ids
        # At the beginning of a text it may write a border: then behind something.
        anchor = ids_with_hidden(_ANCHOR, {}, self.tokenizer)
        return ids_with_hidden(_ANCHOR + shown, hidden, self.tokenizer)[len(anchor) :]

    def joined(self, ids: Sequence[int]) -> bytes | None:
        """The text of `ids`, or None where they are not all text."""
        pieces = [self.written[index] for index in ids]
        text = [piece for piece in pieces if isinstance(piece, bytes)]
        return b"".join(text) if len(text) == len(pieces) else None

    def many(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, which follows on something, and none where they write another text. As `encoded`, but
        for many at once, with control tokens read as such; ids that write nothing are left out."""
        found: list[list[int]] = [[] for _ in texts]
        for anchor in ("", _ANCHOR):
            places = [place for place, ids in enumerate(found) if not ids]
            skipped = len(ids_with_hidden(anchor, {}, self.tokenizer))
            asked = [anchor + texts[place] for place in places]
            every: Any = self.tokenizer(asked, add_special_tokens=False)["input_ids"] if asked else []
            for place, whole in zip(places, every, strict=True):
                if self.joined(whole[skipped:]) == texts[place].encode():
                    found[place] = [index for index in whole[skipped:] if self.written[index]]
        return found


def _writer(tokenizer: PreTrainedTokenizerBase) -> Callable[[str, bool], bytes]:
    """(token, whether it was added) -> bytes."""
    from transformers import PreTrainedTokenizerFast

    decoder = None
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    parts = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        return _byte_level
    borders = any(
        part["type"] == "Metaspace"
        or (
            part["type"] == "Replace"
            and part["pattern"].get("String") == _WORD_BORDER
            and part["content"] == " "
        )
        for part in parts
    )
    if borders:
        return lambda token, _added: _sentence_piece(token, "ByteFallback" in kinds)
    raise ValueError(
        "teacher.align: bytes needs fast tokenizers whose ids each stand for some bytes (byte-level BPE, "
        f"SentencePiece), and {tokenizer.name_or_path or 'this one'} has the decoder "
        f"{', '.join(sorted(kinds)) or 'none'}: leave it out, and choose a teacher of the student's family."
    )


def _byte_level(token: str, added: bool) -> bytes:
    values = [byte_of_character().get(character) for character in token]
    known = [value for value in values if value is not None]
    # An added token is stored as plain text.
    return token.encode() if added or len(known) < len(values) else bytes(known)


def _sentence_piece(token: str, falls_back: bool) -> bytes:
    if falls_back and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_WORD_BORDER, " ").encode()
