"""The progress of a measurement on a terminal and in a file, and the table of how models write."""

import io

import pytest
from rich.console import Console

from redistill.console import CountDisplay, answers_table
from redistill.evaluation.score import EvaluationRow


def counted(**options) -> str:
    now = iter(range(0, 1000, 10))
    console = Console(file=io.StringIO(), width=100, **options)
    with CountDisplay(console, "Measuring [bold]x", clock=lambda: next(now)) as progress:
        for done in range(0, 41, 4):
            progress("greedy answers" if done < 20 else "reading", done, 40)
    return console.file.getvalue()


def test_a_file_gets_a_line_now_and_then():
    lines = counted(force_terminal=False).splitlines()
    assert lines[0].split() == ["Measuring", "[bold]x:", "greedy", "answers", "0/40"]
    assert [line.split("  ")[1] for line in lines] == ["0/40", "12/40", "20/40", "32/40"]
    assert all(line.endswith(" left") for line in lines[1:])


def test_a_terminal_gets_a_bar_that_goes_away():
    text = counted(force_terminal=True, color_system=None)
    assert "40/40" in text and "━" in text and "Measuring [bold]x: reading" in text
    assert text.rstrip("\n").endswith(("\x1b[2K", "\x1b[?25h", "\x1b[1A\x1b[2K"))


def test_the_bar_is_closed_when_measuring_fails():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with pytest.raises(KeyError), CountDisplay(console, "x") as progress:
        progress("reading", 0, 0)
        raise KeyError
    assert "\x1b[?25h" in console.file.getvalue()  # the cursor is back


@pytest.mark.parametrize("width", [80, 120])
def test_how_models_write_shows_every_figure_whole(width):
    full = EvaluationRow(
        "student [b]", 1, *[None] * 6, 0.9312, 48.06, 0.125, 0.5, 0.99, 0.043, 12.5, 13.0, -3.25, "dolly"
    )
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(answers_table([full, EvaluationRow("bare", 1, *[None] * 6)]))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert lines[-2].split() == [
        "student",
        "[b]",
        "12.5",
        "0.50",
        "0.93",
        "0.99",
        "4.3",
        "48.1",
        "12.5",
        "-3.2",
    ]
    assert set(lines[-1].split()[1:]) == {"-"}
