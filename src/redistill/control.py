"""Control tokens are written by a template alone: what a person typed is encoded as the characters it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = 0xF0000  # a private-use plane: one character stands for one hidden string while a template renders
_MARKS_END = 0xFFFFE
_MARKS = re.compile("([\U000f0000-\U000ffffd])")


class TemplateRefusal(ValueError):
    """The tokenizer's chat template raised on this one record, such as a system turn it has no place for."""


def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that are signals and not text: every token the tokenizer marks as special."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added.union(tokenizer.all_special_ids))


def control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What has to be hidden: control tokens, and the marks themselves, so that none can be forged."""
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names.update(tokenizer.all_special_tokens)
    ordered = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, ordered), _MARKS.pattern]))


def hide(text: str, pattern: re.Pattern[str], hidden: dict[str, int]) -> str:
    """`text` with each control string replaced by one mark; `hidden` gives each string the number of its mark."""
    shown = pattern.sub(lambda found: chr(MARK + hidden.setdefault(found[0], len(hidden))), text)
    if len(hidden) > _MARKS_END - MARK:
        raise TemplateRefusal("the record has too many different control texts")
    return shown


def ids_with_hidden(
    text: str, hidden: Mapping[str, int], tokenizer: PreTrainedTokenizerBase, *, bos: bool = False
) -> list[int]:
    """Encodes `text`, hidden strings as the text they are; with none it is one ordinary encoding."""
    if not hidden:
        return plain_ids(text, tokenizer, bos=bos)
    first, *rest = _MARKS.split(text)  # text, mark, text, mark, ..., text
    texts = list(hidden)
    ids = plain_ids(first, tokenizer, bos=bos)
    for mark, piece in zip(rest[::2], rest[1::2], strict=True):
        ids += _literal_ids(texts[ord(mark) - MARK], tokenizer) + plain_ids(piece, tokenizer)
    return ids


def _literal_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if control_ids(tokenizer).isdisjoint(ids):
        return ids
    if len(text) == 1:
        raise TemplateRefusal(f"the tokenizer has no other token for {text!r} than a control token")
    # A tokenizer may ignore the switch; two halves of a control string are never one.
    half = len(text) // 2
    return _literal_ids(text[:half], tokenizer) + _literal_ids(text[half:], tokenizer)


def plain_ids(text: str, tokenizer: PreTrainedTokenizerBase, *, bos: bool = False) -> list[int]:
    """One ordinary encoding, control tokens parsed; bos: opened as the tokenizer opens a text, but once."""
    ids: list[int] = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    opening = tokenizer("", add_special_tokens=True)["input_ids"][:1] if bos else []
    return [*opening, *ids] if opening == [tokenizer.bos_token_id] != ids[:1] else ids
