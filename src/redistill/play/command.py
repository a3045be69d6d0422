"""What `redistill play` does between its options and the page."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from redistill.marking import load_models
from redistill.measure import Request
from redistill.play.page import Table
from redistill.play.pairs import check_place
from redistill.play.server import Serving, bind
from redistill.scoring import TeacherToken


def play(
    names: tuple[str, str],
    request: Request,
    *,
    teacher_token: TeacherToken,
    seed: int,
    pairs: Path,
    host: str,
    port: int,
    console: Console,
) -> None:
    """Serve the page until Ctrl-C. names: of student and teacher.

    Errors: ValueError without gradio, for a port that is taken, a file that is no data set, a model that cannot be
    read, and different tokenizers.
    """
    check_place(pairs)
    with bind(host, port) as bound:
        models = load_models(*names, request.dtype)
        serving = Serving(Table(models, names, request, seed, teacher_token, pairs), host, bound)
        console.print(
            f"{serving.address} asks {names[0]} and {names[1]}; pairs go to {pairs}. Ctrl-C ends the page.",
            soft_wrap=True,
            highlight=False,
        )
        try:
            serving.run()
        except KeyboardInterrupt:
            console.print("The page has ended.")
