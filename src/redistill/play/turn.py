"""One question, the answers to it, and how the page shows them: as values that a page's script makes text of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from redistill.chat import decode_response
from redistill.marking import Answered, Models, Question
from redistill.offsets import token_ends
from redistill.report.plain import cut, number, short, with_kl
from redistill.report.revisions import row_of
from redistill.revision import find_error
from redistill.sample import Sample
from redistill.scoring import Score
from redistill.steplog import revision_record

Writer = Literal["revised", "student", "teacher"]


@dataclass(frozen=True)
class Turn:
    """A question, what the student answered, what became of it, and the teacher's answer.

    revised, score: after `rounds` corrections; the first writing as long as there was none. done: whether there is no
    more to correct.
    """

    models: Models
    answered: Answered
    revised: Sample
    score: Score
    teacher: str
    rounds: int = 0
    done: bool = False

    def texts(self) -> dict[Writer, str]:
        """What can be kept, the best guess first."""
        decoded = [
            decode_response(each.response, self.models.tokenizer) for each in (self.revised, self._first)
        ]
        found: dict[Writer, str] = {"revised": decoded[0]} if self.revised.edits else {}
        return {**found, "student": decoded[1], "teacher": self.teacher}

    def again(self) -> Turn:
        """One correction more."""
        revised, score = self.models.revise(self.answered, self.rounds + 1)
        done = len(revised.edits) <= self.rounds
        return replace(self, revised=revised, score=score, rounds=len(revised.edits), done=done)

    def shown(self) -> dict[str, Any]:
        """`prompt`, the teacher's answer, and the student's as a row of the report's red pen (`report/revisions.py`);
        `state`: "marked" (what SCRG would correct), "agreed" (nothing to), "revised"."""
        row = self._revised() if self.revised.edits else self._marked()
        prompt = self.answered.question.prompt
        state = "revised" if self.revised.edits else "marked" if row["position"] is not None else "agreed"
        return {
            "prompt": prompt,
            "teacher": self.teacher,
            "state": state,
            "rounds": self.rounds,
            "done": self.done,
            "row": row,
        }

    @property
    def _first(self) -> Sample:
        return self.answered.sample

    def _revised(self) -> dict[str, Any]:
        score = self.score
        record = revision_record(self.revised, score.kl, score.teacher_log_likelihood, self.models.tokenizer)
        return row_of(self.rounds, record | {"source": ""})

    def _marked(self) -> dict[str, Any]:
        """The first writing, its error struck out and the teacher's token there, and the rest as it stands."""
        response, score, decode = self._first.response, self.answered.score, self.models.tokenizer.decode
        text, ends = self.texts()["student"], token_ends(response, self.models.tokenizer)
        pieces = with_kl(cut(text, ends) or [], [short(each, 4) for each in score.kl.tolist()])
        error = find_error(score, response, 0)
        place = len(pieces) if error is None else error
        facts = {"step": None, "source": "", "now": None, "gain": None, "tokens": True, "length": len(pieces)}
        row = {
            "kept": pieces[:place],
            "new": [],
            "old": pieces[place + 1 :],
            "rejected": "",
            "replacement": "",
        }
        row |= facts | {
            "position": error,
            "kl": None,
            "was": number(float(score.teacher_log_likelihood.mean())),
        }
        if error is not None:
            rejected = pieces[error][0] or str(decode([response[error]]))
            replacement = str(decode([int(score.teacher_token[error])]))
            row |= {"rejected": rejected, "replacement": replacement, "kl": short(float(score.kl[error]))}
        return row


def take_turn(models: Models, question: Question) -> Turn:
    """Ask both. Errors: ValueError for an empty prompt, and those of `Models.answer`."""
    if not question.prompt.strip():
        raise ValueError("the prompt is empty: type what the student is to answer.")
    answered = models.answer(question)
    said = decode_response(models.teachers_answer(question), models.tokenizer)
    return Turn(models, answered, answered.sample, answered.score, said)
