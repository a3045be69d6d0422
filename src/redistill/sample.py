"""What travels between the stages: an `Example` is text, a `Sample` is token ids and where they came from.

Between stages there is never a padded tensor: replay, resume, revision and logging handle plain tuples of
integers, and only `batch.py` pads.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

Origin = Literal["reference", "rollout", "replay"]


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One record of a data set, as text.

    prompt: plain text, or chat turns; "" for a pure `text` record, of which every token is trained on.
    context: the `input`/`context` column of instruction data, placed by the prompt template.
    references: the accepted responses: none for a prompt-only record, several for sets like S-NI.
    source: "file:line" or "name[row]", for messages and records.
    teacher_prompt: what the teacher reads in the place of prompt and context; None: the same.
    """

    prompt: str | tuple[Message, ...]
    references: tuple[str, ...] = ()
    context: str = ""
    source: str = ""
    teacher_prompt: str | tuple[Message, ...] | None = None


@dataclass(frozen=True, slots=True)
class Edit:
    """One correction by SCRG: at response position `position` the student's `rejected` token became `replacement`.

    before: the whole response as it was before this correction.
    kl: KL(p || q) at the position before the correction, in nats.
    log_likelihood: the teacher's mean log-likelihood per token of `before`, in nats.
    kl_tokens: the KL at every position of `before` that was looked at, four decimals.
    """

    position: int
    rejected: int
    replacement: int
    kl: float
    log_likelihood: float
    before: tuple[int, ...]
    kl_tokens: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and one response to it, as token ids.

    response: ends with an end-of-text id when the writer finished; without one it was cut at a limit.
    origin: "reference" (data set), "rollout" (the student just wrote it), "replay" (it wrote it earlier).
    edits: what SCRG replaced, oldest first; empty for a sample never revised or agreed with.
    agreed: SCRG looked and the teacher's token was the student's at every position.
    behaviour, advantages: one number per response token, or none: the log-probability under which the token was
        written, and how much better than expected what follows it is (MiniLLM's policy gradient; `policy.py`).
    teacher_prompt: what the teacher reads in the place of `prompt`, before the same response; empty: the same.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    origin: Origin = "reference"
    source: str = ""
    edits: tuple[Edit, ...] = ()
    agreed: bool = False
    behaviour: tuple[float, ...] = ()
    advantages: tuple[float, ...] = ()
    teacher_prompt: tuple[int, ...] = ()

    def for_teacher(self) -> Sample:
        """The sample as the teacher reads it: its own prompt is the prompt."""
        return replace(self, prompt=self.teacher_prompt, teacher_prompt=()) if self.teacher_prompt else self


class _Ragged:
    """Rows of numbers of different lengths, one behind the other. kind: an `array` typecode."""

    def __init__(self, kind: str):
        self._numbers: array[Any] = array(kind)
        self._ends = array("q", [0])

    def append(self, row: Iterable[int]) -> None:
        self._numbers.extend(row)
        self._ends.append(len(self._numbers))

    def __getitem__(self, number: int) -> array[Any]:
        return self._numbers[self._ends[number] : self._ends[number + 1]]

    def __len__(self) -> int:
        return len(self._ends) - 1


class Samples(Sequence[Sample]):
    """Samples that are made when they are asked for, by `sample_at`."""

    @abstractmethod
    def sample_at(self, place: int) -> Sample:
        """The one at a place."""

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Sample, ...]: ...
    def __getitem__(self, place: int | slice) -> Sample | tuple[Sample, ...]:
        if isinstance(place, slice):
            return tuple(self.sample_at(each) for each in range(*place.indices(len(self))))
        return self.sample_at(place)


class SampleTable(Samples):
    """Those of a data set, which have prompts, response and source alone, at 4 bytes an id (in a tuple: up to 36)."""

    def __init__(self, samples: Iterable[Sample] = ()):
        self._prompts, self._responses, self._sources = _Ragged("i"), _Ragged("i"), _Ragged("B")
        self._for_teacher = _Ragged("i")
        for sample in samples:
            self.append(sample)

    def append(self, sample: Sample) -> None:
        """Add one at the end."""
        prompts, theirs = (sample.prompt, sample.response), sample.teacher_prompt
        assert sample == Sample(*prompts, source=sample.source, teacher_prompt=theirs), "no room for its rest"
        self._for_teacher.append(theirs)
        self._prompts.append(sample.prompt)
        self._responses.append(sample.response)
        self._sources.append(sample.source.encode("utf-8", "surrogateescape"))

    def __len__(self) -> int:
        return len(self._prompts)

    def sample_at(self, place: int) -> Sample:
        """See `Samples`; from the end on if it is negative. Errors: IndexError."""
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        number = place % len(self)
        source = self._sources[number].tobytes().decode("utf-8", "surrogateescape")
        prompt, response, theirs = (
            tuple(column[number]) for column in (self._prompts, self._responses, self._for_teacher)
        )
        return Sample(prompt, response, source=source, teacher_prompt=theirs)
