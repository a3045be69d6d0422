"""What several commands share: their options, how a list is read from one, and where they print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from redistill import ranks

if TYPE_CHECKING:
    from rich.console import Console

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one setting; repeatable.")
]
Output = Annotated[Path | None, typer.Option("--output", help="Run folder.")]
Template = Annotated[Literal["chat", "alpaca", "plain"], typer.Option(help="How a prompt is written.")]
BatchSize = Annotated[int, typer.Option(min=1)]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many records.")]
Anew = Annotated[bool, typer.Option("--anew", help="Delete what lies there from other settings.")]
TeacherToken = Annotated[Literal["sample", "argmax"], typer.Option(help="Where a correction comes from.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
LONGEST_PROMPT = 8192  # tokens; what is typed by hand is not to be cut


def terminal() -> Console:
    """Where a command prints; rich is loaded when one runs. Paths and names are text, never markup. Of several
    processes the first one speaks."""
    from rich.console import Console

    return Console(markup=False, emoji=False, quiet=not ranks.is_first())


def names(text: str) -> tuple[str, ...]:
    """The names in "a,b", each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def integers(text: str, option: str) -> tuple[int, ...]:
    """The numbers in "1,2", each once, which was given for `option`. Raises ValueError for anything else."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        raise ValueError(f"{option} is {text!r}: give whole numbers with commas, like 10,20,30") from None
