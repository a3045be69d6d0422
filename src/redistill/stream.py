"""Training samples of a data set that is read while training goes on, and never lies in memory as a whole.

Record for record, epoch after epoch: the sample at each place follows from data, settings and seed alone. So the
engine may skip what was trained on, and every rank of a run counts the same places.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from redistill.config import Config
from redistill.data import DataError, Place, Row, rows_from
from redistill.records import TEACHER_PROMPT, Problem, to_example
from redistill.sample import Example, Sample, Samples, SampleTable

log = logging.getLogger(__name__)

# More places than a run has; the engine wants a number.
ENDLESS = 2**50
# Records before which a share of bad ones says nothing.
FEW = 1000
SHOWN = 5
KEPT_MARKS = 1000


@dataclass(frozen=True)
class Mark:
    """Where a block begins.

    first: the place of its first sample. epoch, block: its numbers, from 0, the block's within the epoch. used:
    samples of the epoch before it. counted, bad, left_out: records so far, those of them that could not be used, and
    those over a length limit. place: a `Place` as a mapping; None at an epoch's start.
    """

    first: int = 0
    epoch: int = 0
    block: int = 0
    used: int = 0
    counted: int = 0
    bad: int = 0
    left_out: int = 0
    place: Mapping[str, Any] | None = None


class Stream(Samples):
    """The samples of a run, in the order in which they are trained on: `stream[0]`, `stream[1]`, .., without end.

    Records are read in blocks of `buffer` and shuffled within their block, anew in every epoch. Going on is cheap;
    going back reads from the last known mark before it, or from the start.
    rows: the rows of an epoch from a place on, which is moved along. to_sample: a sample, or why there is none.
    limit: most samples of an epoch. max_bad_share: of the records read so far, from `FEW` on or a whole epoch.
    teacher_prompt: see `load_examples`.
    Raises DataError while it reads: what `rows` raises, over `max_bad_share`, and for an epoch without a sample.
    """

    def __init__(
        self,
        name: str,
        rows: Callable[[Place], Iterator[Row]],
        to_sample: Callable[[Example], Sample | str],
        *,
        buffer: int,
        seed: int,
        limit: int | None = None,
        max_bad_share: float = 0.01,
        teacher_prompt: str = TEACHER_PROMPT,
    ):
        self._column = teacher_prompt
        self._name, self._open, self._to_sample = name, rows, to_sample
        self._buffer, self._seed, self._limit, self._max_bad_share = buffer, seed, limit, max_bad_share
        self._marks: deque[Mark] = deque([Mark()], maxlen=KEPT_MARKS)
        self._problems: list[Problem] = []
        self._go_to(Mark())

    def __len__(self) -> int:
        return ENDLESS

    def sample_at(self, place: int) -> Sample:
        """See `Samples`."""
        self._reach(place)
        return self._block[place - self._at.first]

    def _reach(self, place: int) -> None:
        mark = self._mark_before(place)
        if place < self._at.first or mark.first > self._next.first:
            self._go_to(mark)
        while place >= self._at.first + len(self._block):
            self._read_block()

    def at_hand(self) -> Sequence[Sample]:
        """The first block: what can be looked at before training."""
        self._reach(0)
        return self._block

    def mark(self, place: int) -> dict[str, Any]:
        """What `go_on` needs to find the samples from `place` on without reading those before: plain numbers."""
        return asdict(self._mark_before(place))

    def go_on(self, mark: Mapping[str, Any]) -> None:
        """Know again what `mark` returned, in another process."""
        self._marks.append(Mark(**mark))

    def one_epoch(self) -> Iterator[Sample]:
        """The samples of one epoch in the order of the file, not shuffled."""
        self._go_to(Mark())
        while self._next.epoch == 0:
            yield from self._read_in_order()

    def _mark_before(self, place: int) -> Mark:
        known = (mark for mark in self._marks if mark.first <= place)
        return max(known, key=lambda mark: mark.first, default=Mark())

    def _go_to(self, mark: Mark) -> None:
        self._at = self._next = mark
        self._block, self._rows = SampleTable(), None

    def _read_block(self) -> None:
        mark = self._next
        found = self._read_in_order()
        self._at = mark
        self._marks.append(mark)
        order = np.random.default_rng([self._seed, mark.epoch, mark.block]).permutation(len(found))
        self._block = SampleTable(found[int(number)] for number in order)

    def _read_in_order(self) -> SampleTable:
        """The samples of the next block; `_next` is then the block after it."""
        mark, found = self._next, SampleTable()
        if self._rows is None:
            self._place = Place(**(mark.place or {}))
            self._rows = self._open(self._place)
        counts = {"counted": mark.counted, "bad": mark.bad, "left_out": mark.left_out}
        read, ended = 0, False
        while not ended and read < self._buffer:
            if (row := next(self._rows, None)) is not None:
                read += 1
                self._take(row, found, counts)
            ended = row is None or mark.used + len(found) == self._limit
        used = mark.used + len(found)
        self._check(mark.epoch, used, counts, ended)
        begun = replace(mark, first=mark.first + len(found), **counts)
        if ended:
            self._rows = None
            self._next = replace(begun, epoch=mark.epoch + 1, block=0, used=0, place=None)
        else:
            self._next = replace(begun, block=mark.block + 1, used=used, place=asdict(self._place))
        return found

    def _take(self, row: Row, found: SampleTable, counts: dict[str, int]) -> None:
        source, record = row
        counts["counted"] += 1
        example = record if isinstance(record, Problem) else to_example(record, source, self._column)
        if isinstance(example, Problem):
            counts["bad"] += 1
            return self._say(example)
        sample = self._to_sample(example)
        if isinstance(sample, str):
            counts["left_out"] += 1
            return self._say(Problem(source, sample))
        return found.append(sample)

    def _say(self, problem: Problem) -> None:
        if len(self._problems) < SHOWN:
            self._problems.append(problem)
            log.warning("left out: %s: %s", problem.source, problem.what)

    def _check(self, epoch: int, used: int, counts: Mapping[str, int], ended: bool) -> None:
        counted, bad, left_out = counts["counted"], counts["bad"], counts["left_out"]
        shown = "".join(f"\n  {problem.source}: {problem.what}" for problem in self._problems)
        if ended and counted == 0:
            raise DataError(f"{self._name} holds no records; put one JSON object on each line.")
        if (ended or counted >= FEW) and bad > self._max_bad_share * counted:
            raise DataError(
                f"{self._name}: {bad} of the {counted} records read so far cannot be used, more than "
                f"data.max_bad_share = {self._max_bad_share:g}. Mend the data, or raise it.{shown}"
            )
        if ended and used == 0:
            raise DataError(
                f"{self._name}: no record is left. Where prompts are too long, raise data.max_prompt_length, or set "
                f"data.on_long_prompt: truncate.{shown}"
            )
        if ended and epoch == 0:
            log.info(
                "the data end after %d records, %d of them left out: from the start again",
                counted,
                bad + left_out,
            )


def stream_of(config: Config, to_sample: Callable[[Example], Sample | str]) -> Stream:
    """The training data of a recipe as a stream, shuffled by the engine's seed for data."""
    data, training = config.data, config.training
    seed = training.get("data_seed")
    return Stream(
        f"{data.path} (split {data.split})",
        lambda place: rows_from(data.path, data.name, data.split, place, streaming=True),
        to_sample,
        buffer=data.shuffle_buffer_size,
        seed=abs(training.get("seed", 42) if seed is None else seed),
        limit=data.limit,
        max_bad_share=data.max_bad_share,
        teacher_prompt=data.teacher_prompt,
    )


def known(samples: Sequence[Sample]) -> Sequence[Sample]:
    """What can be looked at before training: of a stream its first block, the rest when it comes."""
    return samples.at_hand() if isinstance(samples, Stream) else samples
