"""A revision as a person would mark it: one word struck out, another in its place, and what followed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from redistill.console.plain import one_line, plain_text
from redistill.sample import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Marked:
    """One correction as text; kept + rejected + before_rest was there, kept + replacement + rest is now.

    position: of the corrected token in the response. kl: KL(teacher || student) there, in nats. gain: in the
    teacher's mean log-likelihood per token, in nats; None where it was not measured.
    """

    prompt: str
    kept: str
    rejected: str
    replacement: str
    rest: str
    before_rest: str
    gain: float | None = None
    position: int | None = None
    kl: float | None = None


def marked_from_sample(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str | None = None,
    log_likelihood: float | None = None,
) -> Marked:
    """The last correction of a revised sample.

    prompt: its text where the caller knows it; else the prompt's ids are decoded, template and all.
    log_likelihood: the teacher's mean per token of the response as it is now, for the gain.
    Errors: ValueError for a sample without edits.
    """
    from redistill.chat import decode_response

    if not sample.edits:
        raise ValueError(f"{sample.source or 'The sample'} was not revised: there is no correction to show.")
    edit = sample.edits[-1]
    return marked_revision(
        decode_response(sample.prompt, tokenizer) if prompt is None else prompt,
        edit.before,
        sample.response,
        edit.position,
        tokenizer,
        gain=None if log_likelihood is None else log_likelihood - edit.log_likelihood,
        kl=edit.kl,
    )


def marked_revision(
    prompt: str,
    before: Sequence[int],
    after: Sequence[int],
    position: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    gain: float | None = None,
    kl: float | None = None,
) -> Marked:
    """Cut the ids before and after a correction at `position` into their pieces of text.

    A piece is cut out of the whole text, so that spaces stay, and a character that the correction falls into
    belongs to the corrected word as a whole. A control token is shown by its name.
    """
    from redistill.chat import decode_response

    start = min(_end_of(before, position, tokenizer), _end_of(after, position, tokenizer))
    rejected, before_rest = _piece(before, position, start, tokenizer)
    replacement, rest = _piece(after, position, start, tokenizer)
    kept = decode_response(before, tokenizer)[:start]
    return Marked(prompt, kept, rejected, replacement, rest, before_rest, gain, position, kl)


def _end_of(ids: Sequence[int], count: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many characters of the whole text the first `count` ids have written for good."""
    from redistill.chat import decode_response

    # What a cut inside a character decodes to is no prefix of the whole.
    pairs = zip(decode_response(ids[:count], tokenizer), decode_response(ids, tokenizer), strict=False)
    same = 0
    for part, whole in pairs:
        if part != whole:
            break
        same += 1
    return same


def _piece(
    ids: Sequence[int], position: int, start: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """The text of the id at `position`, which begins at character `start`, and what follows it."""
    from redistill.chat import decode_response
    from redistill.control import control_ids

    whole = decode_response(ids, tokenizer)
    if ids[position] in control_ids(tokenizer):  # end of text above all: shown by its name
        return str(tokenizer.decode([ids[position]])), whole[start:]
    count = position + 1
    while (end := _end_of(ids, count, tokenizer)) <= start and count < len(ids):
        count += 1
    return whole[start:end], whole[end:]


@dataclass(frozen=True)
class _Revision:
    marked: Marked

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        m, grid = self.marked, Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True, style="dim")
        grid.add_column(overflow="fold")
        if m.prompt.strip():
            grid.add_row("asked", Text(_clip(plain_text(m.prompt).strip(), 400)))
        grid.add_row("revised", _marked_line(m, _coloured(console)))
        grid.add_row("before", Text(plain_text(m.kept + m.rejected + m.before_rest).strip(), style="dim"))
        if facts := _facts(m):
            grid.add_row("", Text(facts, style="dim"))
        yield grid


def show_revision(marked: Marked) -> _Revision:
    """The rejected word struck out, the teacher's in its place, then what the student wrote on from there.

    Without colour: `[-rejected-]{+replacement+}`.
    """
    return _Revision(marked)


@dataclass(frozen=True)
class _Excerpt:
    marked: Marked
    label: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # A few cells stay free: terminals do not agree on the width of every character.
        m, width = self.marked, max(options.max_width - 4, 1)
        kept, room = one_line(m.kept), max(width // 3, 8)
        kept = f"…{kept[-room:].lstrip()}" if len(kept) > room else kept
        short = replace(m, kept=kept, rest=one_line(m.rest)[:width])
        line = Text(self.label, style="dim") + _marked_line(short, _coloured(console))
        line.truncate(width, overflow="ellipsis")
        yield line


def excerpt(marked: Marked, label: str = "") -> _Excerpt:
    """One line, as `show_revision` marks it: a little of what stands before the correction, and what follows."""
    return _Excerpt(marked, label)


def _coloured(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _marked_line(marked: Marked, coloured: bool) -> Text:
    kept, rest = plain_text(marked.kept), plain_text(marked.rest)
    rejected, replacement = one_line(marked.rejected), one_line(marked.replacement)
    between = ""
    if rejected[:1] == replacement[:1] == " ":
        kept, rejected, replacement, between = kept + " ", rejected[1:], replacement[1:], " "
    if not coloured:
        return Text(f"{kept}[-{rejected}-]{{+{replacement}+}}{rest}".lstrip())
    return Text.assemble(
        kept.lstrip(), (rejected, "red strike"), between, (replacement, "bold green"), (rest.rstrip(), "cyan")
    )


def _clip(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[: size // 2].rstrip()} … {text[-size // 2 :].lstrip()}"


def _facts(marked: Marked) -> str:
    facts = []
    if marked.position is not None:
        facts.append(f"token {marked.position + 1}")
    if marked.kl is not None:
        facts.append(f"KL {marked.kl:.2f} nats")
    if marked.gain is not None:
        facts.append(f"teacher's log-likelihood {marked.gain:+.2f} per token")
    return ", ".join(facts)
