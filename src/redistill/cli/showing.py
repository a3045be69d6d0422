"""The commands that open a page: report, watch, play."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from redistill.cli.options import LONGEST_PROMPT, Dtype, TeacherToken, Template, terminal

Runs = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN...", help="Folders of train, demo, evaluate or compare; several are laid side by side."
    ),
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")]


def report(
    runs: Runs,
    output: Annotated[
        Path | None, typer.Option(help="The file; report.html in the first RUN if left out.")
    ] = None,
) -> None:
    """Write one HTML page about one or more runs: scores, curves, revisions, answers. It needs no network."""
    from redistill.report.page import Report, render
    from redistill.runlog import write_whole

    target = output or runs[0] / "report.html"
    page = render(Report(runs).data())
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, page)
    terminal().print(f"{target} ({len(page.encode()) / 1e6:.1f} MB)", soft_wrap=True, highlight=False)


def watch(runs: Runs, port: Port = 8790) -> None:
    """Show the same page live while a run goes on in another process; it waits for one that has not begun."""
    from redistill.report.server import HOST, serve

    with serve(runs, port) as server:
        address = f"http://{HOST}:{server.server_address[1]}/"
        terminal().print(
            f"{address} shows {', '.join(map(str, runs))}; Ctrl-C ends the page, not the run.",
            soft_wrap=True,
            highlight=False,
        )
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            terminal().print("The page has ended.")


def play(
    student: Annotated[str, typer.Argument(help="Hub id or folder.")],
    teacher: Annotated[str, typer.Option(help="Hub id or folder, of the same vocabulary.")],
    pairs: Annotated[
        Path, typer.Option(help="File that kept pairs are added to; `redistill train` reads it.")
    ] = Path("pairs.jsonl"),
    template: Template = "chat",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="Of both models; 0 is greedy.")] = 1.0,
    teacher_token: TeacherToken = "sample",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    dtype: Dtype = "float32",
    host: Annotated[
        str, typer.Option(help="0.0.0.0 lets other machines in, without a password.")
    ] = "127.0.0.1",
    port: Port = 8791,
) -> None:
    """Ask a student on a local page, see the red pen in its answer, revise it by a click, and keep it as data."""
    from redistill.measure import Request
    from redistill.play.command import play as run_play

    request = Request(
        template=template,
        max_prompt_length=LONGEST_PROMPT,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        dtype=dtype,
    )
    run_play(
        (student, teacher),
        request,
        teacher_token=teacher_token,
        seed=seed,
        pairs=pairs,
        host=host,
        port=port,
        console=terminal(),
    )
