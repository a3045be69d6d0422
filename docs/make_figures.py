"""Writes docs/figures/*.svg, the three levels in drawings: `python docs/make_figures.py [scrg] [dac-kl] [spans]`.

Every number in them is what the package's own functions say today: of eight made-up probabilities for the token
level, of six for the phrase level, and of an answer of a real model for the sequence level (the demo's teacher, which
`redistill demo` prepares). `tests/test_site.py` draws them again and compares.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

import torch

from redistill.demo.teacher import prepare_teacher
from redistill.generate import generate
from redistill.loading import load_model, load_tokenizer
from redistill.losses import dac_terms, forward_kl, span_correlation
from redistill.losses.dac_kl import clip_of
from redistill.losses.divergences import distributions
from redistill.models import end_of_text_ids
from redistill.phrases import find_phrases
from redistill.revision import revise_samples
from redistill.sample import Sample
from redistill.sampling import Sampling
from redistill.scoring import score
from redistill.student import prune_layers, select_layers

FOLDER = Path(__file__).with_name("figures")
WIDTH = 460
STYLE = """
svg { --card: #ffffff; --ink: #24292f; --soft: #6b7280; --line: #d8dee4;
  --p: #3b6fd4; --q: #d97706; --off: #e5e7eb; --bad: #c0362c; }
@media (prefers-color-scheme: dark) {
  svg { --card: #1b1d23; --ink: #e6e8eb; --soft: #9aa3ad; --line: #3a3f47;
    --p: #7ba4f5; --q: #f0a04b; --off: #3a3f47; --bad: #f07a70; }
}
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--ink); }
.code { font: 12.5px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre; }
.soft { fill: var(--soft); font-size: 12px; }
.bold { font-weight: 600; }
.big { font-size: 19px; }
.strike { text-decoration: line-through; }
.end { text-anchor: end; }
.mid { text-anchor: middle; }
.card { fill: var(--card); }
.p { fill: var(--p); }
.q { fill: var(--q); }
.off { fill: var(--off); }
.bad { fill: var(--bad); }
.line { stroke: var(--line); stroke-width: 1; }
.edge { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 3 2; }
"""


class Drawing:
    """An SVG of fixed width that grows downwards; `y` is where the next thing goes."""

    def __init__(self, title: str):
        self.title, self.y = title, 28.0
        self._parts: list[str] = []

    def text(self, x: float, text: str, kind: str = "", dy: float = 0.0) -> None:
        """A line of text whose base is at `y + dy`; kind: classes of STYLE."""
        self._parts.append(
            f'<text x="{x:g}" y="{self.y + dy:g}" class="{kind}">{escape(text, quote=False)}</text>'
        )

    def bar(self, x: float, width: float, kind: str, height: float = 11.0, dy: float = 0.0) -> None:
        """A bar that stands on the line of text at `y + dy`."""
        size = f'width="{max(width, 0):.2f}" height="{height:g}"'
        self._parts.append(f'<rect x="{x:.2f}" y="{self.y + dy - height + 1:g}" {size} class="{kind}"/>')

    def line(self, x: float, x2: float, dy: float, dy2: float, kind: str = "line") -> None:
        """From (x, y + dy) to (x2, y + dy2)."""
        self._parts.append(
            f'<line x1="{x:.2f}" y1="{self.y + dy:g}" x2="{x2:.2f}" y2="{self.y + dy2:g}" class="{kind}"/>'
        )

    def paragraph(self, pieces: list[tuple[str, str]], characters: int = 58) -> None:
        """Running text of (text, kind) pieces, broken at spaces."""
        lines: list[list[tuple[str, str]]] = [[]]
        used = 0
        for text, kind in pieces:
            for place, word in enumerate(text.split(" ")):
                shown = word if place == 0 else f" {word}"
                if used + len(shown) > characters and lines[-1]:
                    lines.append([])
                    used, shown = 0, shown.lstrip()
                lines[-1].append((shown, kind))
                used += len(shown)
        for line in lines:
            spans = "".join(
                f'<tspan class="{kind}">{escape(text, quote=False)}</tspan>' for text, kind in line
            )
            self._parts.append(f'<text x="20" y="{self.y:g}" xml:space="preserve">{spans}</text>')
            self.y += 19

    def svg(self) -> str:
        """The whole file."""
        height = self.y + 4
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n"
            f'<rect class="card" width="{WIDTH}" height="{height:g}" rx="8"/>\n'
            + "\n".join(self._parts)
            + "\n</svg>\n"
        )


def dac_kl_figure() -> str:
    """The clip of one position: eight classes on the axis, what is kept of each, and what both divergences say."""
    words = ("mat", "floor", "sofa", "bed", "roof", "dog", "sky", "law")
    p = torch.tensor([[0.46, 0.20, 0.14, 0.08, 0.05, 0.04, 0.02, 0.01]])
    q = torch.tensor([[0.30, 0.16, 0.20, 0.14, 0.04, 0.08, 0.05, 0.03]])
    lower, upper = torch.tensor([0.10]), torch.tensor([0.90])
    m = clip_of(distributions(q.log(), p.log()), (lower, upper)).m[0]
    terms = dac_terms(q.log(), p.log(), lower, upper)
    left_out = 1 - m
    drawing = Drawing("DAC-KL on one position: the classes on the axis, what is kept of each, and the bucket")
    drawing.text(20, "“The cat sat on the …”", "bold")
    drawing.y += 20
    drawing.text(20, "the classes by the teacher's mass, least probable first", "soft")
    drawing.y += 34
    x, scale = 20.0, 420.0
    for place in reversed(range(len(words))):
        width = float(p[0, place]) * scale
        drawing.bar(x, width - 1, "off", 22)
        inside = float(m[place]) * width
        # The lower level cuts a class from its left, the upper one from its right.
        drawing.bar(x + width - inside, inside - 1, "p", 22)
        if width > 26:
            drawing.text(x + width / 2, words[place], "mid", 18)
        x += width
    for level, name in ((lower, "lower"), (upper, "upper")):
        at = 20 + float(level) * scale
        drawing.line(at, at, -26, 6, "edge")
        drawing.text(at, f"{name} {float(level):.2f}", "soft mid", 36)
    drawing.y += 68
    drawing.text(20, "class", "soft")
    drawing.text(90, "teacher p", "soft")
    drawing.text(230, "student q", "soft")
    drawing.text(440, "kept m", "soft end")
    for place, word in enumerate(words):
        drawing.y += 20
        drawing.text(20, word)
        for start, values, kind in ((90, p, "p"), (230, q, "q")):
            value = float(values[0, place])
            drawing.bar(start, value * 150, kind if m[place] > 0 else "off")
            drawing.text(start + value * 150 + 5, f"{value:.2f}", "soft")
        drawing.text(440, f"{float(m[place]):.2f}", "end" if m[place] > 0 else "soft end")
    drawing.y += 10
    drawing.line(20, 440, 0, 0)
    drawing.y += 20
    bucket_p, bucket_q = float((left_out * p[0]).sum()), float((left_out * q[0]).sum())
    drawing.text(20, "bucket")
    for start, value, kind in ((90, bucket_p, "p"), (230, bucket_q, "q")):
        drawing.bar(start, value * 150, kind)
        drawing.text(start + value * 150 + 5, f"{value:.2f}", "soft")
    drawing.y += 30
    drawing.text(20, f"forward KL {float(forward_kl(q.log(), p.log())):.4f} nats")
    drawing.text(440, f"DAC-KL {float(terms.divergence):.4f} nats", "bold end")
    drawing.y += 20
    classes, mass = float(terms.retained_classes), float(terms.retained_mass)
    drawing.text(20, f"{classes:.1f} of {len(words)} classes and {mass:.0%} of the mass kept", "soft")
    drawing.y += 14
    return drawing.svg()


def spans_figure() -> str:
    """The phrases of a sentence, and the correlation vectors of the one pair of a phrase of two words."""
    sentence, words = "The old river has run past the mill.", ("has", "had", "is", "run", "ran", "gone")
    p = torch.tensor([[0.50, 0.25, 0.15, 0.04, 0.04, 0.02], [0.03, 0.05, 0.15, 0.40, 0.12, 0.25]])
    q = torch.tensor([[0.30, 0.20, 0.25, 0.10, 0.10, 0.05], [0.10, 0.10, 0.25, 0.25, 0.20, 0.10]])
    (gap,) = span_correlation(q.log(), p.log(), torch.tensor([0, 0])).tolist()
    drawing = Drawing(
        "The phrases of a sentence, and how the tokens of one go together in teacher and student"
    )
    advance = 11.6  # of a monospaced character at 19 px
    for phrase in find_phrases(sentence, "textblob"):
        start, end = 20 + phrase.start * advance, 20 + phrase.end * advance
        drawing.line(start + 2, end - 2, 12, 12, "edge")
        drawing.text((start + end) / 2, phrase.label, "soft mid", 28)
    for place, character in enumerate(sentence):
        drawing.text(20 + (place + 0.5) * advance, character, "code mid big")
    drawing.y += 62
    drawing.text(20, "word", "soft")
    drawing.text(72, "at “has”", "soft")
    drawing.text(152, "at “run”", "soft")
    drawing.text(240, "both: c = first × second", "soft")
    for place, word in enumerate(words):
        drawing.y += 36
        drawing.text(20, word, dy=6)
        for values, kind, dy in ((p, "p", 0), (q, "q", 13)):
            first, second = (float(values[row, place]) for row in (0, 1))
            drawing.text(72, f"{first:.2f}", f"{kind}", dy)
            drawing.text(152, f"{second:.2f}", f"{kind}", dy)
            drawing.bar(240, first * second * 2200, kind, 10, dy)
            drawing.text(240 + first * second * 2200 + 5, f"{first * second:.4f}", "soft", dy)
    drawing.y += 46
    drawing.text(20, "teacher", "p bold")
    drawing.text(80, "student", "q bold")
    drawing.text(440, f"‖c_p − c_q‖ = {gap:.4f}", "bold end")
    drawing.y += 14
    return drawing.svg()


def scrg_figure(length: int = 22) -> str:
    """One answer of a student, the two models' difference at each of its tokens, and what becomes of it."""
    folder = prepare_teacher()
    tokenizer, teacher = load_tokenizer(folder), load_model(folder, dtype="float32")

    def asked(question: str) -> tuple[int, ...]:
        turns = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    question = "What is the capital of France?"
    prompt = asked(question)
    layers = select_layers(teacher, 25, [asked("Why is the sky blue?")])
    student = prune_layers(teacher, layers)
    eos, size = frozenset(end_of_text_ids(tokenizer, teacher)), len(tokenizer)
    greedy = {
        "sampling": Sampling(temperature=0.0),
        "eos": eos,
        "generator": None,
        "vocabulary": size,
        "batch_size": 1,
    }
    (answer,) = generate(student, [prompt], limits=[length], **greedy)
    written = Sample(prompt, answer, "rollout", "figure")
    how = {"teacher_token": "argmax", "vocabulary": size, "generator": None, "batch_size": 1}
    (seen,) = score(student, teacher, [written], **how)
    (revised,) = revise_samples(
        student, teacher, [written], rounds=1, teacher_token="argmax", max_completion_length=length, **greedy
    )
    (after,) = score(student, teacher, [revised], **how)
    return _draw_revision(question, len(layers), tokenizer, written, revised, seen, after)


def _draw_revision(question, layers, tokenizer, written, revised, seen, after) -> str:
    edit = revised.edits[0]
    drawing = Drawing(
        "SCRG on a real answer: how far student and teacher are apart at each token, and the revision"
    )
    drawing.text(20, f"“{question}”", "bold")
    drawing.y += 20
    drawing.text(20, f"a student of {layers} of the teacher's 30 layers answers", "soft")
    drawing.y += 30
    drawing.text(20, "student's token", "soft")
    drawing.text(150, "d, nats", "soft")
    drawing.text(440, "teacher's token", "soft end")
    scale = 130 / float(seen.kl.max())
    for place, token in enumerate(written.response):
        drawing.y += 18
        wanted, differs = int(seen.teacher_token[place]), int(seen.teacher_token[place]) != token
        here = place == edit.position
        drawing.text(20, _shown(tokenizer, token), "code bad bold" if here else "code")
        drawing.bar(150, float(seen.kl[place]) * scale, "bad" if here else "p" if differs else "off")
        drawing.text(156 + float(seen.kl[place]) * scale, f"{float(seen.kl[place]):.2f}", "soft")
        if differs:
            drawing.text(440, _shown(tokenizer, wanted), "code end bold" if here else "code end soft")
    drawing.y += 34
    kept, rest = edit.before[: edit.position], edit.before[edit.position + 1 :]
    again = revised.response[edit.position + 1 :]
    parts = [tokenizer.decode(list(ids)) for ids in (kept, [edit.rejected], rest, [edit.replacement], again)]
    drawing.text(20, "before", "soft")
    drawing.y += 19
    drawing.paragraph([(parts[0], ""), (parts[1], "bad bold strike"), (parts[2], "soft")])
    drawing.y += 8
    drawing.text(20, "after", "soft")
    drawing.y += 19
    drawing.paragraph([(parts[0], ""), (parts[3], "p bold"), (parts[4], "")])
    drawing.y += 6
    before, now = (float(each.teacher_log_likelihood.mean()) for each in (seen, after))
    drawing.text(20, f"teacher's log-likelihood per token: {before:.2f} before, {now:.2f} after", "soft")
    drawing.y += 14
    return drawing.svg()


def _shown(tokenizer, token: int) -> str:
    return tokenizer.decode([token]).replace("\n", "↵").replace(" ", "·")


FIGURES = {"scrg": scrg_figure, "dac-kl": dac_kl_figure, "spans": spans_figure}

if __name__ == "__main__":
    for name in sys.argv[1:] or FIGURES:
        (FOLDER / f"{name}.svg").write_text(FIGURES[name](), encoding="utf-8")
        print(FOLDER / f"{name}.svg")
