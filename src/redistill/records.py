"""One record of a data set -> an `Example`, or the reason why not.

Formats, tried in this order: TRL's `messages`; `prompt` with `completion` (or `response`, `output`), each of
them text or chat turns; `prompt` alone; Alpaca's and Dolly's `instruction`, `input` or `context`, `output` or
`response`; `text`. Beside any of them, `teacher_prompt`: a prompt, text or turns, for the teacher alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from redistill.sample import Example, Message

ROLES = ("system", "user", "assistant")
ANSWERS = ("completion", "response", "output")
TEACHER_PROMPT = "teacher_prompt"


@dataclass(frozen=True, slots=True)
class Problem:
    """A record that cannot be used. source: "file:line" or "file[row]". what: the reason."""

    source: str
    what: str


class _Unusable(Exception):
    """Carries the reason out of the readers below to `to_example`."""


def to_example(record: Any, source: str, teacher_prompt: str = TEACHER_PROMPT) -> Example | Problem:
    """The example in `record`; a Problem for a missing column, a wrong type, an empty prompt or response.

    teacher_prompt: the column with what the teacher reads in the prompt's place, where a record has it.
    """
    try:
        example = _read(record, source)
        given = record.get(teacher_prompt)
        return (
            example
            if given is None
            else replace(example, teacher_prompt=_other(given, teacher_prompt, example))
        )
    except _Unusable as reason:
        return Problem(source, str(reason))


def _other(value: Any, column: str, example: Example) -> str | tuple[Message, ...]:
    """A prompt, as text or turns, for the teacher alone."""
    if not isinstance(value, list | tuple):
        return _text(value, column)
    if not (turns := _turns(value, column)):
        raise _Unusable(f'has an empty "{column}"')
    if example.prompt == "":
        raise _Unusable(f'has turns in "{column}" before a plain "text": give text')
    return turns


def _read(record: Any, source: str) -> Example:
    if not isinstance(record, Mapping):
        raise _Unusable(f"is {_kind(record)}, not an object with named columns")
    columns = {key: value for key, value in record.items() if value is not None}
    if "messages" in columns:
        prompt, answer = _split(_turns(columns["messages"], "messages"), "messages")
        return Example(prompt, (answer,), source=source)
    if "prompt" in columns:
        return _prompt_record(columns, source)
    if "instruction" in columns:
        prompt = _text(columns["instruction"], "instruction")
        context = columns.get("input", columns.get("context", ""))
        references = _references(columns, ("output", "response"))
        if not references:
            raise _Unusable('has "instruction" but no "output" or "response"')
        return Example(prompt, references, _text(context, "input", empty=True), source)
    if "text" in columns:
        return Example("", (_text(columns["text"], "text"),), source=source)
    raise _Unusable(
        'has no "messages", "prompt", "instruction" or "text"; '
        + (f"it has {', '.join(map(_shown, list(columns)[:8]))}" if columns else "it is empty")
    )


def _prompt_record(columns: Mapping[str, Any], source: str) -> Example:
    prompt, answer = columns["prompt"], next((columns[name] for name in ANSWERS if name in columns), None)
    if isinstance(prompt, str) and not _is_turns(answer):
        return Example(_text(prompt, "prompt"), _references(columns, ANSWERS), source=source)
    turns = (
        (Message("user", _text(prompt, "prompt")),) if isinstance(prompt, str) else _turns(prompt, "prompt")
    )
    if not turns:
        raise _Unusable('has an empty "prompt"')
    if not _is_turns(answer):
        return Example(turns, _references(columns, ANSWERS), source=source)
    before, reference = _split(turns + _turns(answer, "completion"), "completion")
    if len(before) < len(turns):
        raise _Unusable('has no assistant turn in "completion"')
    plain = isinstance(prompt, str) and len(before) == 1
    return Example(prompt if plain else before, (reference,), source=source)


def _references(columns: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """One response, or a list of accepted ones; none when there is no such column."""
    name = next((name for name in names if name in columns), None)
    if name is None:
        return ()
    value = columns[name]
    if not isinstance(value, list | tuple):
        return (_text(value, name),)
    if not value:
        raise _Unusable(f'has an empty "{name}"')
    return tuple(_text(item, name) for item in value)


def _is_turns(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def _split(turns: tuple[Message, ...], column: str) -> tuple[tuple[Message, ...], str]:
    """The turns before the last assistant turn, and what that says; turns behind it have no answer: left."""
    last = max((place for place, turn in enumerate(turns) if turn.role == "assistant"), default=None)
    if last is None:
        raise _Unusable(f'has no assistant turn in "{column}"')
    if all(turn.role == "system" for turn in turns[:last]):
        raise _Unusable(f'has no user turn before the assistant\'s in "{column}"')
    if not turns[last].content.strip():
        raise _Unusable("has an empty response (the last assistant turn)")
    return turns[:last], turns[last].content


def _turns(value: Any, column: str) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple):
        raise _Unusable(f'has {_kind(value)} in "{column}", not a list of turns')
    turns = []
    for place, turn in enumerate(value):
        where = f"{column}[{place}]"
        if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
            raise _Unusable(f'has no "role" and "content" in {where}')
        if turn["role"] not in ROLES:
            role = _text(turn["role"], f"{where}.role")
            raise _Unusable(f"has the role {_shown(role)} in {where}; known are {', '.join(ROLES)}")
        # An assistant may have said nothing in between, and a system message may be blank; a user may not.
        turns.append(Message(turn["role"], _text(turn["content"], where, empty=turn["role"] != "user")))
    return tuple(turns)


def _text(value: Any, column: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise _Unusable(f'has {_kind(value)} in "{column}", not text')
    if "\0" in value:
        raise _Unusable(f'has a NUL character in "{column}"')
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise _Unusable(f'has half a character (a lone surrogate) in "{column}"') from None
    if not empty and not value.strip():
        raise _Unusable(f'has an empty "{column}"')
    return value


def _shown(name: str) -> str:
    return repr(name if len(name) <= 40 else name[:37] + "...")


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", type(None): "nothing"}
    return kinds.get(type(value), "a list" if isinstance(value, list | tuple) else "an object")
