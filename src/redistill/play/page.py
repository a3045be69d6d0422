"""The page: a gradio page that asks, shows, revises and keeps. Nothing of gradio's own is asked of another host."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from redistill.chat import Template
from redistill.marking import Models, Question
from redistill.measure import Request
from redistill.out_of_memory import is_out_of_memory
from redistill.play.pairs import keep_pair
from redistill.play.theme import colours
from redistill.play.turn import Turn, Writer, take_turn
from redistill.report.drawing import script_of, style_of
from redistill.report.page import to_json

if TYPE_CHECKING:
    import gradio

LABELS: dict[Writer, str] = {"revised": "Revised", "student": "Student’s", "teacher": "Teacher’s"}


@dataclass(frozen=True)
class Table:
    """What a page is about. names: of student and teacher, as they were given. pairs: the file that pairs go to."""

    models: Models
    names: tuple[str, str]
    request: Request
    seed: int
    teacher_token: Any
    pairs: Path


def have_gradio() -> Any:
    """The package, told to keep to itself. Errors: ValueError where it is not installed."""
    for name, value in (("GRADIO_ANALYTICS_ENABLED", "False"), ("HF_HUB_DISABLE_TELEMETRY", "1")):
        os.environ[name] = value
    try:
        import gradio
    except ImportError as problem:
        raise ValueError('`redistill play` needs gradio: pip install "redistill[play]".') from problem
    return gradio


def build(table: Table) -> gradio.Blocks:
    """The page's parts, and what each of them does."""
    gr = have_gradio()
    with gr.Blocks(analytics_enabled=False, title="redistill play", fill_width=False) as page:
        turn = gr.State(None)
        _drawn(gr, {"title": [Path(name).name or name for name in table.names]})
        prompt = gr.Textbox(
            label="Prompt", lines=3, max_lines=12, placeholder="What is the student to answer?"
        )
        with gr.Accordion("Settings", open=False):
            settings = _settings(gr, table)
        ask = gr.Button("Ask", variant="primary", elem_id="ask")
        shown = _drawn(gr, {"empty": True})
        revise = gr.Button("Revise", visible=False, elem_id="revise")
        with gr.Column(elem_id="keep", visible=False) as keep:
            writer = gr.Radio([], label="Answer to keep")
            answer = gr.Textbox(label="Answer as it is saved; it can be changed", lines=4, max_lines=20)
            save = gr.Button("Save the pair", elem_id="save")
            saved = _drawn(gr, {"note": f"Pairs go to {table.pairs}."})
        outputs = [turn, shown, revise, keep, writer, answer, saved]

        def after(found: Turn | None, problem: str = "") -> list[Any]:
            return _after(gr, table, found, problem)

        how: dict[str, Any] = {"outputs": outputs, "api_visibility": "private", "concurrency_id": "models"}
        how |= {"concurrency_limit": 1, "show_progress_on": [shown]}
        for event in (ask.click, prompt.submit):
            event(_asking(table, after), [prompt, *settings], **how)
        revise.click(_revising(after), [turn], **how)
        quick: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
        writer.input(_chosen, [turn, writer], [answer], **quick)
        save.click(_saving(table), [turn, writer, answer], [saved], **quick)
    return page


def _settings(gr: Any, table: Table) -> list[Any]:
    request = table.request
    with gr.Row():
        template = gr.Dropdown(list(get_args(Template)), value=request.template, label="Template")
        most, warmest = max(512, request.max_new_tokens), max(2.0, request.temperature)
        tokens = gr.Slider(1, most, value=request.max_new_tokens, step=1, label="Longest answer")
        temperature = gr.Slider(
            0, warmest, value=request.temperature, step=0.05, label="Temperature, 0: greedy"
        )
    with gr.Row():
        correction = gr.Dropdown(
            ["sample", "argmax"], value=table.teacher_token, label="Teacher’s token in a correction"
        )
        seed = gr.Number(table.seed, precision=0, label="Seed")
    return [template, tokens, temperature, correction, seed]


def _asking(table: Table, after: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    def ask(
        prompt: str, template: Template, tokens: int, temperature: float, correction: Any, seed: int | None
    ) -> list[Any]:
        def answered() -> Turn:
            if seed is None or seed < 0:
                raise ValueError("the seed is a whole number from 0 on.")
            how: dict[str, Any] = {"template": template, "max_new_tokens": int(tokens)}
            request = replace(table.request, temperature=float(temperature), **how)
            return take_turn(table.models, Question(prompt, request, correction, int(seed)))

        return _said(answered, None, after)

    return ask


def _revising(after: Callable[..., list[Any]]) -> Callable[[Turn], list[Any]]:
    return lambda turn: _said(turn.again, turn, after)


def _said(make: Callable[[], Turn], before: Turn | None, after: Callable[..., list[Any]]) -> list[Any]:
    """What the page shows next; what a user can mend is a sentence on it."""
    try:
        return after(make())
    except ValueError as problem:
        return after(before, str(problem))
    except RuntimeError as problem:
        if not is_out_of_memory(problem):
            raise
        return after(before, "out of memory: shorten the prompt or the longest answer.")


def _after(gr: Any, table: Table, turn: Turn | None, problem: str) -> list[Any]:
    texts = turn.texts() if turn is not None else {}
    first = next(iter(texts), None)
    value: dict[str, Any] = turn.shown() if turn is not None else {"empty": True}
    more = turn is not None and not turn.done and value["state"] != "agreed"
    label = "Revise once more" if turn is not None and turn.rounds else "Revise"
    return [
        turn,
        to_json(value | {"problem": problem}),
        gr.update(visible=more, value=label),
        gr.update(visible=turn is not None),
        gr.update(choices=[(LABELS[each], each) for each in texts], value=first),
        texts.get(first, "") if first else "",
        to_json({"note": f"Pairs go to {table.pairs}."}),
    ]


def _chosen(turn: Turn | None, writer: Writer) -> str:
    return "" if turn is None else turn.texts().get(writer, "")


def _saving(table: Table) -> Callable[[Turn, Writer, str], str]:
    def save(turn: Turn, writer: Writer, answer: str) -> str:
        who = writer if answer == turn.texts().get(writer) else "edited"
        try:
            count = keep_pair(table.pairs, turn.answered.question.prompt, answer, who)
        except ValueError as problem:
            return to_json({"problem": str(problem)})
        return to_json({"note": f"Saved: {table.pairs} holds {count} line{'s' * (count != 1)} now."})

    return save


def _drawn(gr: Any, value: dict[str, Any]) -> Any:
    """A part that our own script draws, as text nodes; gradio is given no markup of a model's."""
    own = (resources.files("redistill.play") / "assets" / "play.js").read_text(encoding="utf-8")
    script = script_of("text", "pen", end=own)
    return gr.HTML(to_json(value), html_template="", js_on_load=script, apply_default_css=False)


def mounted(page: gradio.Blocks, parts: Sequence[Any] = ()) -> Any:
    """The page as an application at `/`. parts: middleware around it."""
    gr = have_gradio()
    from fastapi import FastAPI

    own = (resources.files("redistill.play") / "assets" / "play.css").read_text(encoding="utf-8")
    style = style_of("colours") + f".redistill {{\n{style_of('marks')}}}\n" + own
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, middleware=list(parts))
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=colours(gr),
        head=f"<style>{style}</style>",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        show_error=False,
    )
