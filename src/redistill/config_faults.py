"""The wording of what is wrong with a configuration: where, which setting, what, the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Key = tuple[str, ...]
Root = type[BaseModel]
LISTED = 10


def origin_of(key: Key, origins: Mapping[Key, str], file: str) -> str:
    """Where `key` was set, or else the nearest section around it."""
    return next((origins[key[:n]] for n in range(len(key), 0, -1) if key[:n] in origins), file)


def faults(error: ValidationError, root: Root, origins: Mapping[Key, str], file: str) -> Iterator[str]:
    """One line per setting; the alternatives of a union are joined."""
    by_key: dict[Key, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_key.setdefault(_setting(detail, root), []).append(detail)
    for key, details in by_key.items():
        origin, name = origin_of(key, origins, file), shortened(".".join(key))
        if details[0]["type"] == "conflict":
            yield f"{origin}: {details[0]['msg']}"
        elif details[0]["type"] == "extra_forbidden":
            yield f"{origin}: {name} is not a setting.{_nearest_setting(key, root)}"
        elif details[0]["type"] == "missing":
            yield f"{origin}: {name} is missing.{_required(key, root)}"
        elif not name:
            yield f"{origin}: a configuration is a mapping with the sections {', '.join(root.model_fields)}."
        else:
            said = list(dict.fromkeys(_what_is_wrong(detail, key) for detail in details))
            yield f"{origin}: {name} {', or '.join(said)}."


def _setting(detail: ErrorDetails, root: Root) -> Key:
    """The dotted name an error is about: pydantic's location without list places and union branches."""
    if detail["type"] == "conflict":
        return tuple(detail.get("ctx", {})["key"].split("."))
    key, model = [], root
    for part in detail["loc"]:
        if model is None or not isinstance(part, str):
            break
        key.append(part)
        model = _section(model, part)
    return tuple(key)


def _section(model: Root, name: str) -> Root | None:
    """The settings class behind a field, if it is a section."""
    field = model.model_fields.get(name)
    kinds = () if field is None else (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _what_is_wrong(detail: ErrorDetails, key: Key) -> str:
    given, context = detail["input"], detail.get("ctx", {})
    message = detail["msg"].replace("Input should", "should").replace("a valid tuple", "a list")
    if detail["type"].startswith(("model_type", "dict_type")):
        message = "should be a section of settings"
    element = "".join(f"[{part}]" for part in detail["loc"][len(key) :] if isinstance(part, int))
    near = ""
    if detail["type"] == "literal_error" and isinstance(given, str):
        near = nearest(given, context["expected"].replace("'", "").replace(" or ", ", ").split(", "))
    return f"{element and element + ' '}is {shown(given)} but {message}{near and '.' + near.rstrip('.')}"


def shown(value: object) -> str:
    """A value as it was given, but not all of a long one."""
    return shortened(repr(value))


def shortened(text: str) -> str:
    """At most 80 characters of it."""
    return text if len(text) <= 80 else text[:77] + "..."


def listed(lines: Sequence[str]) -> str:
    """The first faults, a line each, and how many more there are."""
    more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n".join([*lines[:LISTED], *more])


def _required(key: Key, root: Root) -> str:
    section: Root | None = root
    for part in key:
        section = _section(section, part) if section is not None else None
    names = [] if section is None else [n for n, field in section.model_fields.items() if field.is_required()]
    return f" It needs {' and '.join('.'.join((*key, name)) for name in names)}." if names else ""


def nearest(name: str, candidates: Sequence[str]) -> str:
    """A sentence that names the candidate most like `name`; "" when none is like it."""
    found = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f" Nearest valid name: {found[0]}." if found else ""


def setting_names(model: Root, prefix: Key = ()) -> Iterator[Key]:
    """The dotted names of all settings and sections, as tuples."""
    for name in model.model_fields:
        yield (*prefix, name)
        section = _section(model, name)
        if section is not None:
            yield from setting_names(section, (*prefix, name))


def _nearest_setting(key: Key, root: Root) -> str:
    """A name like it in the same section; else such a name in another section; else what the section has."""
    names = list(setting_names(root))
    siblings = {name[-1]: name for name in names if name[:-1] == key[:-1]}
    close = difflib.get_close_matches(key[-1], siblings, n=1, cutoff=0.5)
    elsewhere = [name for name in names if name[-1] == key[-1]] or [
        name for name in names if difflib.SequenceMatcher(None, name[-1], key[-1]).ratio() > 0.8
    ]
    if close or elsewhere:
        return f" Nearest valid name: {'.'.join(siblings[close[0]] if close else elsewhere[0])}."
    return f" Valid names here: {', '.join(siblings)}."
