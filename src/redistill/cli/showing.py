"""The commands that show what a run left behind: report, watch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from redistill.cli.options import terminal

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
