"""Writes docs/settings.md from the sections of `redistill.config`: `python docs/make_settings.py`.

Types, ranges, defaults and meanings all come from the code; nothing is kept here but the frame.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redistill.config import Config

Schema = dict[str, Any]

TARGET = Path(__file__).with_name("settings.md")
HEADER = """\
# Settings

This page is generated from the code: change `src/redistill/settings.py`, then run `python docs/make_settings.py`.
How a recipe is written is in [recipes.md](recipes.md).

A setting is named `section.setting`, in YAML by indenting and on the command line by `--set section.setting=value`.
"Ours" in a meaning says that the default follows no source.
"""
COLUMNS = "| setting | type and range | default | meaning |\n| --- | --- | --- | --- |"
NAMES = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}


def render() -> str:
    """The whole page."""
    schema = Config.model_json_schema()
    definitions: dict[str, Schema] = schema["$defs"]
    parts = [HEADER]
    for name, field in schema["properties"].items():
        parts += _section(name, field, definitions, required=name in schema["required"])
    return "\n".join(parts)


def _section(name: str, field: Schema, definitions: dict[str, Schema], *, required: bool) -> Iterator[str]:
    """Heading, text and table of one section; a section inside it follows as one of its own."""
    section = _section_in(field, definitions)
    if section is None:
        yield f"## {name}\n\n{_line(field['description'])}\n"
        return
    note = " Required." if required else ""
    yield f"## {name}\n\n{_line(section['description'])}{note}\n\n{COLUMNS}"
    inner: list[tuple[str, Schema]] = []
    for setting, value in section["properties"].items():
        full = f"{name}.{setting}"
        if _section_in(value, definitions) is not None:
            inner.append((full, value))
        yield _row(full, value, definitions, required=setting in section.get("required", ()))
    yield ""
    for full, value in inner:
        yield from _section(full, value, definitions, required=False)


def _section_in(field: Schema, definitions: dict[str, Schema]) -> Schema | None:
    """The section behind a field, also where it may be null."""
    for option in field.get("anyOf", [field]):
        if "$ref" in option:
            return definitions[option["$ref"].rpartition("/")[2]]
    return None


def _row(name: str, field: Schema, definitions: dict[str, Schema], *, required: bool) -> str:
    section = _section_in(field, definitions)
    kind = "; or ".join(_kind(option, name) for option in field.get("anyOf", [field]))
    default = "required" if required else _code(field.get("default"))
    if section is not None and field.get("default") is not None:
        default = "as below"
    meaning = _line(field.get("description") or (section or {}).get("description", ""))
    return f"| `{name}` | {_cell(kind)} | {_cell(default)} | {_cell(meaning)} |"


def _kind(option: Schema, name: str) -> str:
    """One alternative of a setting's type, in words."""
    if "$ref" in option:
        return f"section, see [{name}](#{name.replace('.', '')})"
    if "enum" in option:
        return ", ".join(_code(value) for value in option["enum"])
    kind = option["type"]
    if kind == "null":
        return "`null`"
    if kind == "array":
        return f"list of: {_kind(option['items'], name)}"
    if "pattern" in option:
        return "rule as text"
    return NAMES[kind] + _range(option)


def _range(option: Schema) -> str:
    low, above = option.get("minimum"), option.get("exclusiveMinimum")
    high, below = option.get("maximum"), option.get("exclusiveMaximum")
    first = "" if low is None and above is None else f"above {above:g}" if low is None else f"from {low:g}"
    last = "" if high is None and below is None else f"below {below:g}" if high is None else f"to {high:g}"
    words = " ".join(part for part in (first, last) if part)
    return f", {words}" if words else ""


def _code(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
