"""Writes docs/commands.md, what `redistill COMMAND --help` says of every command: `python docs/make_commands.py`."""

from __future__ import annotations

from pathlib import Path

import typer
from typer.testing import CliRunner

from redistill.cli import app

TARGET = Path(__file__).with_name("commands.md")
HEADER = """\
# Commands

This page is generated from the code: after changing a command run `python docs/make_commands.py`. It is what
`redistill COMMAND --help` says. What a message means is in [every message](errors.md).
"""


def render() -> str:
    """The whole page."""
    parts = [HEADER]
    for name, command in typer.main.get_command(app).commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        if not command.hidden:
            shown = CliRunner().invoke(app, [name, "--help"], prog_name="redistill", env={"COLUMNS": "96"})
            text = "\n".join(line.rstrip() for line in shown.output.strip().splitlines())
            parts.append(f"## `redistill {name}`\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
