"""What of a configuration may be told to others: ids of the hub and settings, no folders, servers or tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from redistill.config import Config

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_WORD = re.compile(r"[\w.-]+")
# Settings that say where things lie or are sent, and nothing about the model.
_PLACES = ("responses_path", "weights_dir", "url")
_SENT = (
    "hub_",
    "push_to_hub",
    "output_dir",
    "report_to",
    "run_name",
    "project",
    "trackio",
    "logging_dir",
    "disable_tqdm",
)


def hub_id(name: str | None) -> str | None:
    """`name` where it is an id of the hub (owner/name) and no folder of this machine; else None."""
    return name if name and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def public_name(name: str) -> str:
    """A hub id as it is, a path by its last part: nobody else has the folders around it."""
    return hub_id(name) or Path(name).name or name


def base_of(config: Config) -> str:
    """The model that the student was before training: its own, or the teacher that it was pruned from."""
    return config.student.model_name_or_path or config.teacher.model_name_or_path


def public_settings(config: Config) -> dict[str, Any]:
    """The settings that differ from the defaults, without what belongs to this machine or account."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=True)
    engine = values.pop("training", {})
    kept = {
        key: value for key, value in engine.items() if not key.startswith(_SENT) and _tells_no_place(value)
    }
    return {**_public(values), **({"training": kept} if kept else {})}


def _tells_no_place(value: object) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, str) and bool(_WORD.fullmatch(value)))


def _public(values: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in values.items():
        if isinstance(value, dict):
            kept[key] = _public(value)
        elif key in ("model_name_or_path", "path", "eval_path") and isinstance(value, str):
            kept[key] = public_name(value)
        elif key not in _PLACES:
            kept[key] = value
    return kept
