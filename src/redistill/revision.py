"""SCRG, sequence correction and re-generation (Liu et al., arXiv 2407.10068; docs/paper.md, section 1).

The student's answer is compared with the teacher position by position; where the two differ most the
teacher's token takes the place of the student's, and the student writes on from there. What it then writes may be
worse than what it wrote before: `accept` says whether it is taken all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from redistill import ranks
from redistill.clock import Clock
from redistill.engines.writer import Loop, Request, Writer
from redistill.generate import Decoding, answering, draw_uniforms, go_on, select_rows
from redistill.sample import Edit, Sample
from redistill.sampling import Sampling
from redistill.scoring import Score, Scorer, TeacherToken, batches, check_samples, position_uniforms
from redistill.teachers.signal import Teacher

Accept = Literal["always", "better"]


def find_error(score: Score, response: Sequence[int], start: int) -> int | None:
    """The position to correct: argmax of d_i over the i >= start with y_i != t_i, the first among equals.

    None when the teacher's token is the response's at every position from `start` on.
    """
    differs = score.teacher_token != torch.tensor(response, dtype=torch.long)
    differs[:start] = False
    if not bool(differs.any()):
        return None
    return int(score.kl.masked_fill(~differs, -torch.inf).argmax())


def revise_samples(
    student: nn.Module,
    teacher: nn.Module | Teacher,
    samples: Sequence[Sample],
    *,
    rounds: int,
    teacher_token: TeacherToken,
    sampling: Sampling,
    generator: torch.Generator | None,
    eos: frozenset[int],
    vocabulary: int,
    max_completion_length: int,
    batch_size: int,
    clock: Clock | None = None,
    packed: bool = False,
    writer: Writer | None = None,
    accept: Accept = "always",
) -> list[Sample]:
    """Correct each response at its error token and let the student write on from there, `rounds` times.

    Every round: score, find the error token j, keep y_<j bit for bit, put the teacher's t_j at j, and let the
    student go on with `sampling` up to `max_completion_length` response tokens; t_j in `eos` ends it there.
    A round after the first looks behind the last position revised by this call only.
    Only the first `max_completion_length` tokens of a response are looked at.

    Returns the samples in order: a revised one has one more `Edit` per correction; one that had nothing to
    correct in the first round (an empty response among them) is unchanged but for `agreed`. `rounds` of 0
    returns the samples as they are.
    accept: "always" takes the last response, which is not scored again; "better" the one of the most `reward` in all,
        of the first, each correction's and the last, the earlier of equals: later edits then are left out.
    generator: feeds the teacher's tokens and the student's sampling; the same state gives the same revision.
    clock: gets the phases scoring and revision (correcting, writing on). packed: whether both models `packs`.
    writer: who writes on for the student, prompt and kept tokens read anew; None: our own loop, from what the
        scoring has read already.
    In a run of several processes all call this with the same samples and generator; each rank revises its share.
    Errors: ValueError for `rounds` under 0, `max_completion_length` under 1, and those of `score`.
    """
    _check_settings(rounds, max_completion_length)
    check_samples(samples, batch_size)
    limit = max_completion_length
    looked_at = [row for row, each in enumerate(samples) if each.response and rounds]
    revised = [each if each.response or not rounds else replace(each, agreed=True) for each in samples]
    texts = [samples[row] for row in looked_at]
    how = Sampling(temperature=1.0 if teacher_token == "sample" else 0.0)
    looks = rounds + (accept == "better")
    chance = [_chance(texts, how, sampling, limit, generator, number) for number in range(looks)]
    writing = Writing(student, writer or Loop(student), sampling, eos, vocabulary, limit, batch_size)
    reading = Reading(teacher, how, keep=not writer, packed=packed, rounds=rounds)
    correct = partial(_revise_some, writing, reading, texts, chance, clock or Clock())
    for row, found in zip(looked_at, ranks.divided(len(looked_at), correct), strict=True):
        revised[row] = found
    return revised


class Chance(NamedTuple):
    """The random numbers of one round, in [0, 1). teachers: at least one for each position of each response. own:
    [rows, limit]. All are drawn beforehand, so that the cut into batches, and over ranks, changes none."""

    teachers: Sequence[Tensor]
    own: Tensor


def _chance(
    texts: Sequence[Sample],
    how: Sampling,
    sampling: Sampling,
    limit: int,
    generator: torch.Generator | None,
    number: int,
) -> Chance:
    # How long the answers are is known before the first round only.
    if number == 0:
        teachers = position_uniforms([_cut(each, limit) for each in texts], how, generator)
    else:
        teachers = tuple(draw_uniforms(len(texts), limit, how, generator))
    return Chance(teachers, draw_uniforms(len(texts), limit, sampling, generator))


@dataclass(frozen=True)
class Writing:
    """How the student writes; limit: the most tokens of a whole response."""

    student: nn.Module
    writer: Writer
    sampling: Sampling
    eos: frozenset[int]
    vocabulary: int
    limit: int
    batch_size: int


@dataclass(frozen=True)
class Reading:
    """How both models read; the fields are arguments of `Scorer`. rounds: behind so many a look is the last, which
    corrects nothing but tells what the corrections are worth."""

    teacher: nn.Module | Teacher
    how: Sampling
    keep: bool
    packed: bool
    rounds: int


def _revise_some(
    writing: Writing,
    reading: Reading,
    texts: Sequence[Sample],
    chance: Sequence[Chance],
    clock: Clock,
    places: list[int],
) -> list[Sample]:
    """What becomes of the texts at `places`."""
    revised = [texts[place] for place in places]
    for rows in batches([_cut(each, writing.limit) for each in revised], writing.batch_size):
        at = [places[row] for row in rows]
        lots = [Chance([teachers[place] for place in at], own[at]) for teachers, own in chance]
        found = _revise_batch(writing, reading, [revised[row] for row in rows], lots, clock)
        for row, each in zip(rows, found, strict=True):
            revised[row] = each
    return revised


def _revise_batch(
    writing: Writing, reading: Reading, revised: list[Sample], chance: Sequence[Chance], clock: Clock
) -> list[Sample]:
    """All rounds on texts that are read together."""
    again, judged = len(chance) > 1, len(chance) > reading.rounds
    scorer = Scorer(
        writing.student,
        reading.teacher,
        writing.vocabulary,
        reading.how,
        packed=reading.packed,
        keep=reading.keep,
        again=again,
    )
    # Which rows are looked at, and from where on they have changed; scores up to there stay.
    rows, first = list(range(len(revised))), [0] * len(revised)
    read, scores = rows, dict[int, Score]()
    rewards: list[list[float]] = [[] for _ in rows]
    first_edit = [len(each.edits) for each in revised]
    for number, (teachers, own) in enumerate(chance, start=1):
        texts = [_cut(revised[row], writing.limit) for row in rows]
        with clock.phase("scoring"):
            numbers = [
                teachers[row][at : len(s.response)] for row, at, s in zip(rows, first, texts, strict=True)
            ]
            found = scorer.score(texts, [read.index(row) for row in rows], first, numbers)
        for row, at, score in zip(rows, first, found, strict=True):
            scores[row] = scores[row].continued(at, score) if at else score
            rewards[row].append(float(scores[row].reward.sum()))
        if number > reading.rounds:
            break
        with clock.phase("revision"):
            # What was corrected before is not looked at again.
            start = {row: at + (number > 1) for row, at in zip(rows, first, strict=True)}
            corrected = _correct_rows(revised, start, scores)
            state = scorer.own.lend(last=number == len(chance))
            _write_on(writing, revised, corrected, rows, state, own[rows])
        read = rows
        # One that ends with its correction is behind its last position, and looked at only to be judged.
        rows = [row for row, end in corrected.items() if judged or end < len(revised[row].response)]
        first = [corrected[row] - 1 for row in rows]
        if not rows:
            break
    if not judged:
        return revised
    return [_best(*each) for each in zip(revised, first_edit, rewards, strict=True)]


def _best(sample: Sample, first_edit: int, rewards: Sequence[float]) -> Sample:
    """What it was when its reward was highest. first_edit: of this call's; rewards: before each, and at the end."""
    best = first_edit + rewards.index(max(rewards))
    if best == len(sample.edits):
        return sample
    return replace(sample, response=sample.edits[best].before, edits=sample.edits[:best])


def _write_on(
    writing: Writing,
    revised: list[Sample],
    corrected: dict[int, int],
    rows: list[int],
    state: Decoding | None,
    uniforms: Tensor,
) -> None:
    """The student goes on behind each correction, from what it has read already (`state`, row by row as `rows`)."""
    places = [
        place
        for place, row in enumerate(rows)
        if row in corrected
        and corrected[row] < writing.limit
        and revised[row].response[-1] not in writing.eos
    ]
    if not places:
        return
    unfinished = [rows[place] for place in places]
    prefixes = [revised[row].prompt + revised[row].response for row in unfinished]
    limits = [writing.limit - corrected[row] for row in unfinished]
    how = {"sampling": writing.sampling, "eos": writing.eos, "vocabulary": writing.vocabulary}
    if state is None:
        asked = Request(prefixes, limits, uniforms=uniforms[places], batch_size=writing.batch_size, **how)
        tails = writing.writer.write(asked)
    else:
        device = state.position.device
        # The teacher's token is the first that was not read.
        kept = torch.tensor([len(prefix) - 1 for prefix in prefixes], device=device)
        tokens = torch.tensor([prefix[-1] for prefix in prefixes], device=device)
        state = select_rows(state, torch.tensor(places, device=device)).cut(kept)
        with answering(writing.student):
            tails = go_on(writing.student, tokens, state, limits=limits, uniforms=uniforms[places], **how)
    for row, tail in zip(unfinished, tails, strict=True):
        revised[row] = replace(revised[row], response=(*revised[row].response, *tail))


def _correct_rows(
    revised: list[Sample], start: dict[int, int], scores: Mapping[int, Score]
) -> dict[int, int]:
    """Correct the rows of `start` in place, each behind its first position; the corrected ones' lengths."""
    corrected = {}
    for row, first in start.items():
        found = scores[row]
        error = find_error(found, revised[row].response[: len(found.kl)], first)
        if error is not None:
            revised[row] = _correct(revised[row], found, error)
            corrected[row] = error + 1
        elif first == 0:
            revised[row] = replace(revised[row], agreed=True)
    return corrected


def _correct(sample: Sample, score: Score, position: int) -> Sample:
    """The sample, ending with the teacher's token at `position`, and the edit noted."""
    replacement = int(score.teacher_token[position])
    edit = Edit(
        position=position,
        rejected=sample.response[position],
        replacement=replacement,
        kl=float(score.kl[position]),
        log_likelihood=float(score.teacher_log_likelihood.mean()),
        before=sample.response,
        kl_tokens=tuple(round(value, 4) for value in score.kl.tolist()),
    )
    kept = (*sample.response[:position], replacement)
    return replace(sample, response=kept, edits=(*sample.edits, edit), agreed=False)


def _cut(sample: Sample, length: int) -> Sample:
    return replace(sample, response=sample.response[:length])


def _check_settings(rounds: int, max_completion_length: int) -> None:
    if rounds < 0:
        raise ValueError(f"rounds is {rounds}: give 0 (no revision) or more.")
    if max_completion_length < 1:
        raise ValueError(f"max_completion_length is {max_completion_length}: give 1 or more.")
