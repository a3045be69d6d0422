"""Student and teacher at one prompt: what the student answers, what both think of it, and what SCRG makes of it.

What `redistill revise` prints and `redistill play` shows comes from here: one question gives both the same answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from redistill.generate import generate
from redistill.loading import best_device
from redistill.measure import Request, to_samples
from redistill.models import ends_of, load_model, load_tokenizer, shared_vocabulary
from redistill.revision import revise_samples
from redistill.sample import Example, Sample
from redistill.sampling import Sampling
from redistill.scoring import Score, TeacherToken, score


@dataclass(frozen=True)
class Question:
    """A prompt, and how it is answered. request: template, length and temperature. teacher_token: where a correction
    comes from. seed: of all random numbers."""

    prompt: str
    request: Request
    teacher_token: TeacherToken = "sample"
    seed: int = 0


@dataclass(frozen=True)
class Answered:
    """What the student wrote, and how both read it. state: of the random numbers before they read it, so that a
    correction meets the very tokens of the teacher that `score` has."""

    question: Question
    sample: Sample
    score: Score
    state: Tensor


@dataclass(frozen=True)
class Models:
    """A student and its teacher, read once and asked often. vocabulary: the number of ids that both share."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int

    def answer(self, question: Question) -> Answered:
        """The student's answer, scored. Errors: ValueError for a prompt that makes no sample."""
        generator, prompt = torch.Generator().manual_seed(question.seed), self._prompt(question)
        limits = [question.request.max_new_tokens]
        writing = self._writing(question, self.student, generator)
        response = generate(self.student, [prompt], limits=limits, batch_size=1, **writing)[0]
        sample, state = Sample(prompt, response, "rollout", "prompt"), generator.get_state()
        return Answered(question, sample, self._scored(question, sample, generator), state)

    def revise(self, answered: Answered, rounds: int) -> tuple[Sample, Score]:
        """The answer after `rounds` corrections, and how both read it now; fewer `edits` than rounds where there was
        no more to correct. The first rounds of many are those of fewer."""
        question, generator = answered.question, torch.Generator()
        generator.set_state(answered.state)
        revised = revise_samples(
            self.student,
            self.teacher,
            [answered.sample],
            rounds=rounds,
            teacher_token=question.teacher_token,
            max_completion_length=question.request.max_new_tokens,
            batch_size=1,
            **self._writing(question, self.student, generator),
        )[0]
        return revised, self._scored(question, revised, generator)

    def teachers_answer(self, question: Question) -> tuple[int, ...]:
        """What the teacher writes under the same settings."""
        writing = self._writing(question, self.teacher, torch.Generator().manual_seed(question.seed))
        limits = [question.request.max_new_tokens]
        return generate(self.teacher, [self._prompt(question)], limits=limits, batch_size=1, **writing)[0]

    def _prompt(self, question: Question) -> tuple[int, ...]:
        asked = Example(question.prompt, source="prompt")
        (sample, _) = to_samples([asked], self.tokenizer, question.request)[0]
        return sample.prompt

    def _writing(
        self, question: Question, model: PreTrainedModel, generator: torch.Generator
    ) -> dict[str, Any]:
        return {
            "sampling": Sampling(question.request.temperature),
            "eos": ends_of(self.tokenizer, model, question.request.template),
            "generator": generator,
            "vocabulary": self.vocabulary,
        }

    def _scored(self, question: Question, sample: Sample, generator: torch.Generator) -> Score:
        return score(
            self.student,
            self.teacher,
            [sample],
            vocabulary=self.vocabulary,
            teacher_token=question.teacher_token,
            generator=generator,
            batch_size=1,
        )[0]


def load_models(student: str, teacher: str, dtype: str) -> Models:
    """Both models on the best device here. Errors: those of `load_model`; ValueError for different tokenizers."""
    tokenizer, theirs = load_tokenizer(student), load_tokenizer(teacher)
    ours, large = (load_model(name, dtype=dtype, device=best_device()) for name in (student, teacher))
    return Models(ours, large, tokenizer, shared_vocabulary(tokenizer, theirs, ours, large))
