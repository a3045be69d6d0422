"""What the terminal shows, caught at 80 and 120 columns, with and without colour."""

import io
import random
import re
from dataclasses import replace

import pytest
from rich.console import Console
from tiny import EOS_ID, IM_END, tiny_tokenizer
from transformers import TrainerControl, TrainerState, TrainingArguments

from redistill.console import (
    Marked,
    StepDisplay,
    evaluation_table,
    excerpt,
    marked_from_sample,
    marked_revision,
    plain_text,
    position_table,
    show_revision,
    training_progress,
)
from redistill.evaluation.score import EvaluationRow
from redistill.sample import Edit, Sample

TOKENIZER = tiny_tokenizer()
# A colour for the terminal, its title, a link of rich's markup, a bell, and text turned right to left.
HOSTILE = "\x1b[31mred\x1b]0;title\x07 [bold]loud[/bold] [link=x]y[/link] \x9b2J\u202etxt"
MARKED = Marked("Where is it?", "The capital is", " Lyon", " Paris", ".", ", I think.", 0.34, 3, 2.5)


def shown(renderable, width: int = 80, *, colour: bool = False) -> str:
    file = io.StringIO()
    system = "standard" if colour else None
    Console(file=file, width=width, color_system=system, force_terminal=colour).print(renderable)
    return file.getvalue()


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("width", [80, 120])
def test_table_shows_every_figure_whole(width):
    rows = [
        EvaluationRow("teacher", 134_515_008, 24.5, 23.254, 0.4, 0.0, 19.04, 312.4),
        EvaluationRow("student before", 99_100_000, 1.0, 0.5, 0.25, 3.6612, 44512.3, 420.0),
        EvaluationRow("some-organisation/a-model-with-a-long-name[bold]", 1_240_000_000, *[None] * 6),
    ]
    text = shown(evaluation_table(rows), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    head = words(" ".join(lines[:2]))
    for name in (
        "ROUGE-L",
        "greedy",
        "mean ± std",
        "KL to",
        "teacher",
        "parameters",
        "perplexity",
        "tokens/s",
    ):
        assert name in head
    teacher, before = (next(line for line in lines if line.startswith(row.name)) for row in rows[:2])
    assert teacher.split() == ["teacher", "134.5M", "24.50", "23.25", "±", "0.40", "0.000", "19.0", "312"]
    assert before.split()[2:] == ["99.1M", "1.00", "0.50", "±", "0.25", "3.661", "44,512", "420"]
    for ends in (re.finditer(r"\S+(?: ± \S+)?", line[16:]) for line in (teacher, before)):
        # Right-aligned: the figures of a column end at the same place.
        assert [m.end() for m in ends] == [m.end() for m in re.finditer(r"\S+(?: ± \S+)?", teacher[16:])]
    assert "1.2B" in text
    assert "[bold]" in "".join(line.split("  ")[0].strip() for line in lines[-3:])


def test_revision_without_colour():
    text = words(shown(show_revision(MARKED)))
    assert "asked Where is it?" in text
    assert "The capital is [-Lyon-]{+Paris+}." in text
    assert "The capital is Lyon, I think." in text
    assert "+0.34" in text and "2.50" in text
    inside = replace(MARKED, kept="Par", rejected="king", replacement="is", gain=None, kl=None, position=None)
    assert "Par[-king-]{+is+}." in shown(show_revision(inside))
    assert "[-↵-]{+is+}" in shown(show_revision(replace(inside, rejected="\n")))


def test_revision_with_colour():
    text = shown(show_revision(MARKED), colour=True)
    assert "\x1b[9;31mLyon\x1b[0m" in text  # struck out, red
    assert "\x1b[1;32mParis\x1b[0m" in text  # bold, green
    assert "{+" not in text


@pytest.mark.parametrize("colour", [False, True])
def test_model_text_is_only_text(colour):
    hostile = Marked(*[HOSTILE] * 6)
    rows = [EvaluationRow(HOSTILE, 1, *[None] * 6)]
    for renderable in (
        show_revision(hostile),
        evaluation_table(rows),
        position_table([HOSTILE], [1.0], [HOSTILE], 0),
    ):
        text = shown(renderable, 400, colour=colour)
        own = re.sub(r"\x1b\[[\d;]*m", "", text) if colour else text
        assert "[bold]" in own and "[/bold]" in own and "[link=x]" in own
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", own)
    if colour:
        assert "\x1b[31mred" not in shown(show_revision(hostile), 400, colour=True)


def test_plain_text_keeps_what_is_text():
    kept = "a\nb é 日本 👩‍🚀 [x] \\[y]"
    assert plain_text(kept) == kept
    assert plain_text("a\r\nb\rc\x00\ud800\td") == "a\nbc  d"


def test_marked_pieces_are_the_whole_text():
    draw, size = random.Random(0), len(TOKENIZER)
    texts = ("The quick brown fox", " 👩‍🚀 über naïve 日本語", "x = 3\n\treturn", "")
    split_characters = 0
    for _ in range(300):
        ids = TOKENIZER.encode(draw.choice(texts) + draw.choice(texts) + "end", add_special_tokens=False)
        position = draw.randrange(len(ids))
        tail = draw.choices(range(4, size), k=draw.randint(0, 4))
        after = [*ids[:position], draw.randrange(4, size), *tail]
        marked = marked_revision("", ids, after, position, TOKENIZER)
        whole = TOKENIZER.decode(ids)
        assert marked.kept + marked.rejected + marked.before_rest == whole
        assert marked.kept + marked.replacement + marked.rest == TOKENIZER.decode(after)
        assert marked.rejected and marked.replacement
        assert "\ufffd" not in marked.kept + marked.rejected
        split_characters += "\ufffd" in TOKENIZER.decode(ids[:position])
    assert split_characters > 10


def test_marked_from_sample_shows_the_last_edit_and_end_of_text():
    def ids(text: str) -> tuple[int, ...]:
        return tuple(TOKENIZER.encode(text, add_special_tokens=False))

    first, second = ids("The capital"), ids(" of France")
    before = (*first, *second, *ids(" is Paris"))
    edits = (
        Edit(0, 9, before[0], 1.0, -3.0, ids("the old river")),
        Edit(len(first), before[len(first)], EOS_ID, 2.0, -1.5, before),
    )
    sample = Sample(ids("What?"), (*first, EOS_ID), "rollout", "here", edits)
    marked = marked_from_sample(sample, TOKENIZER, log_likelihood=-1.0)
    rejected = TOKENIZER.decode([second[0]])
    assert (marked.prompt, marked.kept, marked.rejected) == ("What?", "The capital", rejected)
    assert (marked.replacement, marked.rest) == (IM_END, "")
    assert marked.before_rest == " of France is Paris".removeprefix(rejected)
    assert (marked.gain, marked.kl, marked.position) == (0.5, 2.0, len(first))
    assert marked_from_sample(sample, TOKENIZER, prompt="Said so").prompt == "Said so"
    with pytest.raises(ValueError, match=r"here.*not revised"):
        marked_from_sample(replace(sample, edits=()), TOKENIZER)


def test_position_table():
    text = shown(position_table(["The", " cap", "\n"], [0.5, 2.0, 0.0], ["The", " town", IM_END], 1))
    rows = [line.split() for line in text.splitlines()[2:] if line.strip()]
    assert rows[0][:4] == ["1", "The", "The", "0.50"]
    assert rows[1][:4] == ["2", "·cap", "·town", "2.00"]
    assert rows[2] == ["3", "↵", IM_END, "0.00"]
    assert len(rows[1][4]) == 4 * len(rows[0][4])  # the bars are to scale
    assert "error" in rows[1] and text.count("error") == 1
    shown(position_table(["a", "b"], [float("nan"), float("inf")], ["a", "b"], None))


LOGS = {
    "loss": 3.21,
    "sft": 2.3456,
    "token": 0.84,
    "span": 0.0123,
    "kl": 0.91,
    "tokens_per_second": 312.7,
    "share_revised": 0.75,
    "grad_norm": 1.0,
    "lower": 0.01,
}


def run_steps(
    console: Console, steps: int, total: int, shown: StepDisplay | None = None, revised: dict | None = None
) -> None:
    callback = training_progress(console, shown=shown)
    state, control = TrainerState(max_steps=total), TrainerControl()
    args = TrainingArguments(output_dir="unused", report_to="none")
    callback.on_train_begin(args, state, control)
    for step in range(1, steps + 1):
        state.global_step = step
        callback.on_step_end(args, state, control)
        if shown and revised:
            shown.read("revisions", revised)
            shown.read("steps", {})
        callback.on_log(args, state, control, logs=LOGS)
    callback.on_log(args, state, control, logs={"eval_loss": 1.0, "eval_kl": 0.5})
    callback.on_log(args, state, control, logs={"train_runtime": 9.0, "train_loss": 3.0})
    callback.on_train_end(args, state, control)


def test_progress_without_a_terminal_is_a_plain_line_now_and_then():
    file = io.StringIO()
    run_steps(Console(file=file, width=80), 12, 12)
    lines = file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/12", "step 6/12", "step 11/12", "step 12/12"]
    terms = "loss 3.21 sft 2.35 token 0.84 span 0.0123 kl 0.91"
    assert all(terms in line and "revised 75 %" in line and "313 tokens/s" in line for line in lines)
    assert "0:00 left" in lines[-1]
    assert not re.search(r"[{}\x1b]|eval_|train_", file.getvalue())


def frames(text: str) -> list[str]:
    """What the panel showed, one by one: each begins by going back to the top of the one before."""
    return [
        re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", frame)
        for frame in re.split(r"(?:\r?\x1b\[2K(?:\x1b\[1A)?)+", text)
    ]


def revision(step: int, before: str, after: str, position: int) -> dict:
    ids = [TOKENIZER.encode(text, add_special_tokens=False) for text in (before, after)]
    return {"step": step, "before_ids": ids[0], "after_ids": ids[1], "position": position}


@pytest.mark.parametrize("width", [30, 80, 120])
def test_the_panel_shows_everything_in_place_and_gives_the_cursor_back(width):
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None, _environ={})
    shown = StepDisplay(console, tokenizer=TOKENIZER)
    run_steps(console, 60, 120, shown, revision(12, "What is the capital?", "What was the\x1b[2J\n river", 1))
    last = frames(file.getvalue())[-1]
    assert "60/120" in last and "━" in last and "left" in last
    for piece in (
        "loss 3.21",
        "sft 2.35",
        "token 0.84",
        "span 0.0123",
        "kl 0.91",
        "313 tokens/s",
        "revised 75 %",
    ):
        assert piece in last
    assert "step 12  Wh[-at-]{+at+} was the[2J↵" in last or width == 30
    assert "step 12" in last and "\x1b[2J" not in file.getvalue()
    assert max(map(len, last.splitlines())) <= width
    heights = {len(frame.splitlines()) for frame in frames(file.getvalue())[-20:]}
    assert heights == {4 if width > 30 else len(last.splitlines())}
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")


@pytest.mark.parametrize("width", [8, 40, 80])
def test_an_excerpt_is_one_line_with_the_correction_in_it(width):
    marked = replace(
        MARKED, kept="One line\nand another one " * 9 + "the capital is", rest=" of\nFrance. " * 9
    )
    text = shown(excerpt(marked, "step 3  "), width)
    assert text.count("\n") == 1 and len(text) <= width
    assert width < 80 or "the capital is [-Lyon-]{+Paris+} of↵France" in text


def test_time_left_counts_from_where_the_run_went_on():
    now, file = [100.0], io.StringIO()
    display = StepDisplay(Console(file=file, width=80), every=1, clock=lambda: now[0])
    display.start(50, 100)
    now[0] += 30.0
    display.show(60, LOGS)
    assert "step 60/100" in file.getvalue()
    assert "2:00 left" in file.getvalue()  # 3 s a step, 40 to go
    now[0] += 40 * 3600
    display.show(61, LOGS)
    assert re.search(r"\d+:\d\d:\d\d left", file.getvalue())
