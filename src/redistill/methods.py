"""The methods by name: `methods.yaml` beside this file, and rows that a user defines in the same form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redistill.config_faults import shown
from redistill.yaml_lines import read_yaml

TABLE = Path(__file__).with_name("methods.yaml")
FIELDS = ("from", "source", "settings")
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)


@dataclass(frozen=True)
class Method:
    """One row of the table: its name, where it comes from, and every setting it makes ("rollout.lmbda": 0.5)."""

    name: str
    source: str
    settings: Mapping[str, Any]


def read_methods(own: Mapping[str, Any] | None = None) -> dict[str, Method]:
    """The packaged methods and the user's `own` rows, which may build on any of them (`from`).

    Raises ValueError for a row that is not of the table's form, replaces a packaged one, or builds on nothing.
    """
    packaged, _ = read_yaml(TABLE)
    if taken := sorted(set(packaged) & set(own or {})):
        raise ValueError(f"the method {taken[0]!r} exists already: give your own another name.")
    if odd := [name for name in own or {} if not _NAME.fullmatch(name)]:
        raise ValueError(f"the method {shown(odd[0])} cannot name a folder: use letters, digits and _ . + -")
    rows: dict[str, Any] = {**packaged, **(own or {})}
    return {name: _method(name, rows) for name in rows}


def find_method(name: str, methods: Mapping[str, Method] | None = None) -> Method:
    """The method called `name`; ValueError with the nearest names otherwise."""
    from difflib import get_close_matches

    methods = read_methods() if methods is None else methods
    if name in methods:
        return methods[name]
    near = get_close_matches(name, methods, n=3) or sorted(methods)
    raise ValueError(f"there is no method {shown(name)}. Known: {', '.join(near)}.")


def _method(name: str, rows: Mapping[str, Any], seen: tuple[str, ...] = ()) -> Method:
    row = rows[name]
    if not isinstance(row, dict) or not isinstance(row.get("settings", {}), dict):
        raise ValueError(f"method {name}: give it `from`, `source` and `settings` (section.setting: value).")
    if unknown := sorted(set(row) - set(FIELDS)):
        raise ValueError(f"method {name}: {unknown[0]} is not known; a method has {', '.join(FIELDS)}.")
    parent = row.get("from")
    if parent is not None and (parent not in rows or parent in (*seen, name)):
        raise ValueError(f"method {name}: it builds on {parent!r}, which is no other method.")
    inherited = {} if parent is None else _method(parent, rows, (*seen, name)).settings
    return Method(name, str(row.get("source", "ours")), {**inherited, **row.get("settings", {})})
