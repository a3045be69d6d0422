"""What has to hold of input from anybody: something that can be used, or one sentence; soon; and text stays text.

Each check takes what hypothesis, or atheris (`guided.py`), makes up; it raises AssertionError where that fails.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from redistill.chat import control_ids, prompt_ids, response_ids, to_sample
from redistill.config import Config, load_config
from redistill.console import marked_from_sample, plain_text, position_table, show_revision
from redistill.console.plain import one_line
from redistill.data import DataError, load_examples
from redistill.records import Problem, to_example
from redistill.sample import Edit, Example, Message, Sample

DONE: Counter[str] = Counter()
SECONDS = 5.0
"""Processor time that one made-up input may take; they are of a few kilobytes."""
TURNED = set("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@contextlib.contextmanager
def soon() -> Iterator[None]:
    started = time.process_time()
    yield
    assert time.process_time() - started < SECONDS


def is_sentence(said: str) -> None:
    """Short, and not empty as the command line prints it."""
    assert plain_text(said).strip() and len(said) < 4000, len(said)


def shown_safely(text: str) -> None:
    bad = {c for c in text if (unicodedata.category(c) in ("Cc", "Cs") and c != "\n") or c in TURNED}
    assert not bad, bad


def is_text(text: Any) -> None:
    assert isinstance(text, str) and "\0" not in text
    text.encode("utf-8")


def check_example(found: Example | Problem) -> None:
    if isinstance(found, Problem):
        is_sentence(found.what)
        return
    for text in (*found.references, found.context):
        is_text(text)
    if isinstance(found.prompt, str):
        is_text(found.prompt)
    else:
        assert found.prompt
        for turn in found.prompt:
            assert isinstance(turn, Message) and turn.role in ("system", "user", "assistant")
            is_text(turn.content)


def check_record(record: Any, template: Any = "chat", long: Any = "drop") -> None:
    """One record of a data set, already parsed, on its way to ids."""
    DONE["records"] += 1
    with soon():
        found = to_example(record, "made:1")
        check_example(found)
        if isinstance(found, Example):
            check_sample(found, template, long)


def check_sample(example: Example, template: Any, long: Any) -> None:
    how = {"system": None, "max_prompt_length": 64, "max_completion_length": 32}
    try:
        made = to_sample(example, tokenizer(), template=template, on_long_prompt=long, **how)
    except ValueError as problem:
        is_sentence(str(problem))
        return
    if isinstance(made, str):
        is_sentence(made)
    else:
        assert 0 < len(made.prompt) <= 64 and len(made.response) <= 32
        assert all(0 <= token < len(tokenizer()) for token in made.prompt + made.response)


def check_file(data: bytes, ending: str) -> None:
    """A data file of any bytes."""
    DONE["data files"] += 1
    with tempfile.TemporaryDirectory() as folder, soon():
        path = Path(folder) / f"train{ending}"
        path.write_bytes(data)
        try:
            loaded = load_examples(path, max_bad_share=1.0)
        except DataError as problem:
            is_sentence(str(problem))
            return
        assert loaded.counted == len(loaded.examples) + len(loaded.problems)
        for found in (*loaded.examples, *loaded.problems):
            check_example(found)
        assert len(loaded.summary()) < 4000
        assert [each.name for each in Path(folder).iterdir()] == [path.name]


def check_recipe(text: str, overrides: tuple[str, ...] = ()) -> None:
    """A recipe of any text."""
    DONE["recipes"] += 1
    with tempfile.TemporaryDirectory() as folder, soon():
        path = Path(folder) / "recipe.yaml"
        path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
        try:
            config = load_config(path, overrides)
        except ValueError as problem:
            is_sentence(str(problem))
            return
        assert isinstance(config, Config)
        path.write_text(config.to_yaml(), encoding="utf-8")
        assert load_config(path) == config
        assert [each.name for each in Path(folder).iterdir()] == [path.name]


@cache
def tokenizer() -> Any:
    from tiny import tiny_tokenizer

    return tiny_tokenizer()


def check_typed_text(typed: str, tokenizer: Any, template: Any = "chat") -> None:
    """What was typed arrives as the text it is: it adds no control token, and takes none away."""
    DONE["typed texts"] += 1
    if not typed:  # a record without a prompt is another thing
        return
    control = control_ids(tokenizer)

    def ids_of(text: str) -> tuple[int, ...]:
        return prompt_ids(Example(text), tokenizer, template=template, system=None)

    with soon():
        found, plain = ids_of(typed), ids_of("a")
        assert [i for i in found if i in control] == [i for i in plain if i in control]
        shown = tokenizer.decode(list(found), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert typed in shown, (typed, shown)
        response = response_ids(typed, tokenizer, template=template)
        assert [i for i in response if i in control] == [response[-1]]
        said = tokenizer.decode(list(response[:-1]), clean_up_tokenization_spaces=False)
        assert said == typed, (typed, said)


def check_shown(text: str) -> None:
    """Text of a model on a terminal."""
    DONE["texts of models shown"] += 1
    shown_safely(plain_text(text))
    shown_safely(one_line(text))
    assert "\n" not in one_line(text)


def printed(what: Any) -> str:
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system=None, width=80).print(what)
    return out.getvalue()


def check_revision_shown(prompt: str, before: list[int], after: list[int], position: int) -> None:
    """An answer of any ids, struck out and put in order on a terminal."""
    DONE["revisions shown"] += 1
    position = min(position, len(before) - 1, len(after) - 1)
    after = [*before[:position], *after[position:]]
    edit = Edit(position, before[position], after[position], 1.0, -1.0, tuple(before))
    sample = Sample((1,), tuple(after), "rollout", "made:1", (edit,))
    with soon():
        shown_safely(printed(show_revision(marked_from_sample(sample, tokenizer(), prompt=prompt))))
        words = [tokenizer().decode([i]) for i in before]
        shown_safely(printed(position_table(words, [1.0] * len(words), words, position)))
