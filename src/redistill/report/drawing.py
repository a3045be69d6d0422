"""The scripts and styles that pages are drawn with, put together from their files."""

from __future__ import annotations

from importlib import resources


def asset(name: str) -> str:
    """What a file of `assets/` holds."""
    return (resources.files("redistill.report") / "assets" / name).read_text(encoding="utf-8")


def script_of(*names: str, end: str = "") -> str:
    """Scripts as one that shares no name with any other, and `end` behind them."""
    return "(() => {\n'use strict';\n" + "".join(asset(f"{name}.js") for name in names) + end + "})();\n"


def style_of(*names: str) -> str:
    """Styles one behind the other."""
    return "".join(asset(f"{name}.css") for name in names)
