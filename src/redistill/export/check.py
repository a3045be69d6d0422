"""Whether an exported model says what the student says: greedy answers and forward KL, on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from redistill.chat import Template, to_sample
from redistill.generate import generate
from redistill.losses.divergences import forward_kl
from redistill.models import ends_of, shared_vocabulary
from redistill.sample import Example, Sample
from redistill.sampling import Sampling

Logits = Callable[[Tensor], Tensor]
"""Ids [1, T] -> logits [1, T, V] of an exported model."""
PROMPTS = 32
LONGEST = 64
BROKEN = 0.5
"""Nats per token from which on a conversion is taken to be wrong, and not just rounded. Ours."""


@dataclass(frozen=True)
class Agreement:
    """Of student and exported model. prompts, tokens: how many answers were compared, and of how many tokens.

    equal: answers whose every greedy token is the same. kl: forward KL of the student to the exported model, nats per
    token, over the tokens of the student's greedy answers; kl_max: the largest at one token.
    """

    prompts: int
    tokens: int
    equal: int
    kl: float
    kl_max: float

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Asked:
    """Prompts, the student's greedy answers to them, and its logits [answer, V] where it wrote each."""

    rows: tuple[Sample, ...]
    logits: tuple[Tensor, ...]
    vocabulary: int


def ask(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    template: Template = "chat",
) -> Asked:
    """The student's side. Raises ValueError when no example can be written as a prompt."""
    samples = [
        sample
        for example in examples[:PROMPTS]
        if isinstance(
            sample := to_sample(
                example, tokenizer, template=template, system=None, max_prompt_length=256,
                max_completion_length=LONGEST, on_long_prompt="truncate",
            ),
            Sample,
        )
    ]  # fmt: skip
    if not samples:
        raise ValueError("no record of the prompts can be written for this tokenizer: name other --prompts.")
    vocabulary = shared_vocabulary(tokenizer, tokenizer, student, student)
    answers = generate(
        student,
        [sample.prompt for sample in samples],
        limits=[LONGEST] * len(samples),
        sampling=Sampling(0.0),
        eos=ends_of(tokenizer, student, template),
        generator=torch.Generator(),
        vocabulary=vocabulary,
        batch_size=8,
    )
    rows = tuple(
        Sample(s.prompt, answer, "rollout", s.source) for s, answer in zip(samples, answers, strict=True)
    )

    def logits(ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return student(input_ids=ids.to(student.device)).logits

    return Asked(rows, tuple(_at_answer(logits, row, vocabulary) for row in rows), vocabulary)


def _at_answer(logits: Logits, row: Sample, vocabulary: int) -> Tensor:
    found = logits(torch.tensor([[*row.prompt, *row.response]]))
    return found[0, len(row.prompt) - 1 : -1, :vocabulary].float().cpu()


def compare(asked: Asked, exported: Logits) -> Agreement:
    """How far `exported` agrees. Under one prefix after the other an answer is equal if and only if every next token
    is, so that one reading of each answer replaces writing it anew."""
    equal, tokens, total, largest = 0, 0, 0.0, 0.0
    for row, ours in zip(asked.rows, asked.logits, strict=True):
        theirs = _at_answer(exported, row, asked.vocabulary)
        equal += bool((theirs.argmax(-1) == torch.tensor(row.response)).all())
        kl = forward_kl(theirs, ours)
        tokens, total, largest = (
            tokens + len(row.response),
            total + float(kl.sum()),
            max(largest, float(kl.max())),
        )
    return Agreement(len(asked.rows), tokens, equal, total / tokens, largest)
