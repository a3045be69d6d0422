"""SCRG, sequence correction and re-generation (Liu et al., arXiv 2407.10068; method.md, section 1).

The student's answer is compared with the teacher position by position; where the two differ most the
teacher's token takes the place of the student's, and the student writes on from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from redistill.generate import Sampling, answering, generate, sample
from redistill.models import Head, head_of, hidden_states
from redistill.sample import Edit, Sample

TeacherToken = Literal["sample", "argmax"]


@dataclass(frozen=True)
class Score:
    """What teacher and student think of one response of `T` tokens; CPU tensors of shape [T].

    kl: d_i = KL(p_i || q_i) in nats, fp32, at least 0; 0 where the two distributions are the same.
    teacher_token: t_i, the token of the teacher at the position, given the response before it.
    teacher_log_likelihood, student_log_likelihood: log p_i(y_i) and log q_i(y_i) in nats, of the response's own
        tokens.
    """

    kl: Tensor
    teacher_token: Tensor
    teacher_log_likelihood: Tensor
    student_log_likelihood: Tensor


def score(
    student: nn.Module,
    teacher: nn.Module,
    samples: Sequence[Sample],
    *,
    vocabulary: int,
    teacher_token: TeacherToken,
    generator: torch.Generator | None,
    temperature: float = 1.0,
    batch_size: int,
    chunk: int = 256,
) -> list[Score]:
    """Compare student and teacher at every response position: one `Score` a sample, in order. No gradients.

    vocabulary: the number of ids that both models share.
    teacher_token: "sample" draws t_i from p_i at `temperature` (which touches nothing else), with one uniform
        number per position taken from `generator` beforehand; "argmax" takes the most probable one.
    batch_size: the most samples read at once. chunk: positions whose logits exist at once, so that memory is
        about 4 * chunk * vocabulary numbers of 4 bytes, whatever the batch.
    Errors: ValueError for an empty prompt (nothing then predicts the first token) and a batch size under 1.
    """
    _check_samples(samples, batch_size)
    how = Sampling(temperature=temperature if teacher_token == "sample" else 0.0)
    lengths = [len(each.response) for each in samples]
    uniform = torch.zeros(sum(lengths))
    if how.temperature > 0:
        on = "cpu" if generator is None else generator.device
        uniform = torch.rand(sum(lengths), generator=generator, device=on)
    uniforms = uniform.split(lengths)
    heads = head_of(student, vocabulary), head_of(teacher, vocabulary)
    nothing = torch.empty(0)
    scores = [Score(nothing, nothing.long(), nothing, nothing)] * len(samples)
    with answering(student), answering(teacher):
        for rows in _batches(samples, batch_size):
            batch = [samples[row] for row in rows]
            hidden = _response_states(student, batch), _response_states(teacher, batch)
            said = torch.tensor([token for each in batch for token in each.response])
            found = _compare(
                hidden, heads, said, torch.cat([uniforms[row] for row in rows]), how=how, chunk=chunk
            )
            for row, part in zip(rows, _split(found, [lengths[row] for row in rows]), strict=True):
                scores[row] = part
    return scores


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
    teacher: nn.Module,
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
) -> list[Sample]:
    """Correct each response at its error token and let the student write on from there, `rounds` times.

    Every round: score, find the error token j, keep y_<j bit for bit, put the teacher's t_j at j, and let the
    student go on with `sampling` up to `max_completion_length` response tokens; t_j in `eos` ends it there.
    A round after the first looks behind the last position revised by this call only.
    Only the first `max_completion_length` tokens of a response are looked at.

    Returns the samples in order: a revised one has one more `Edit` per correction; one that had nothing to
    correct in the first round (an empty response among them) is unchanged but for `agreed`. `rounds` of 0
    returns the samples as they are. The last responses are not scored again.
    generator: feeds the teacher's tokens and the student's sampling; the same state gives the same revision.
    Errors: ValueError for `rounds` under 0, `max_completion_length` under 1, and those of `score`.
    """
    _check_settings(rounds, max_completion_length)
    revised = list(samples)
    start = dict.fromkeys(range(len(samples)), 0)
    for _ in range(rounds):
        scores = score(
            student,
            teacher,
            [_cut(revised[row], max_completion_length) for row in start],
            vocabulary=vocabulary,
            teacher_token=teacher_token,
            generator=generator,
            batch_size=batch_size,
        )
        corrected = _correct_rows(revised, start, scores)
        unfinished = [row for row in corrected if revised[row].response[-1] not in eos]
        tails = generate(
            student,
            [revised[row].prompt + revised[row].response for row in unfinished],
            limits=[max_completion_length - corrected[row] for row in unfinished],
            sampling=sampling,
            eos=eos,
            generator=generator,
            batch_size=batch_size,
            vocabulary=vocabulary,
        )
        for row, tail in zip(unfinished, tails, strict=True):
            revised[row] = replace(revised[row], response=revised[row].response + tail)
        start = {row: first for row, first in corrected.items() if first < len(revised[row].response)}
    return revised


def _correct_rows(revised: list[Sample], start: dict[int, int], scores: list[Score]) -> dict[int, int]:
    """Correct the rows of `start` in place, each behind its first position; the corrected ones' lengths."""
    corrected = {}
    for (row, first), found in zip(start.items(), scores, strict=True):
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
    )
    kept = (*sample.response[:position], replacement)
    return replace(sample, response=kept, edits=(*sample.edits, edit), agreed=False)


def _compare(
    hidden: tuple[Tensor, Tensor],
    heads: tuple[Head, Head],
    said: Tensor,
    uniform: Tensor,
    *,
    how: Sampling,
    chunk: int,
) -> Score:
    """`Score` of all N positions of a batch; logits exist for `chunk` positions at a time."""
    device = hidden[0].device
    said, uniform = said.to(device), uniform.to(device)
    parts = []
    for at in range(0, len(said), chunk):
        cut = slice(at, at + chunk)
        q = heads[0].logits(hidden[0][cut]).float().log_softmax(dim=-1)
        logits = heads[1].logits(hidden[1][cut]).to(device).float()
        token = sample(logits, uniform[cut], how)
        p = logits.log_softmax(dim=-1)
        likelihoods = [each.gather(-1, said[cut, None]).squeeze(-1) for each in (p, q)]
        kl = (p.exp() * (p - q)).sum(dim=-1).clamp(min=0.0)
        parts.append([each.cpu() for each in (kl, token, *likelihoods)])
    return Score(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _split(whole: Score, lengths: list[int]) -> Iterator[Score]:
    fields = (whole.kl, whole.teacher_token, whole.teacher_log_likelihood, whole.student_log_likelihood)
    return (Score(*part) for part in zip(*(each.split(lengths) for each in fields), strict=True))


def _response_states(model: nn.Module, batch: list[Sample]) -> Tensor:
    """Hidden states [N, H] that predict the batch's N response tokens, row after row."""
    device = next(model.parameters()).device
    rows = [each.prompt + each.response for each in batch]
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + (0,) * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    select = torch.cat(
        [
            torch.arange(row * width + len(each.prompt) - 1, row * width + len(rows[row]) - 1)
            for row, each in enumerate(batch)
        ]
    )
    return hidden_states(model, ids, mask, select.to(device))


def _batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[int]]:
    """Indices of the samples that have a response, in batches of like length, the longest first."""
    rows = [row for row, each in enumerate(samples) if each.response]
    rows.sort(key=lambda row: -len(samples[row].prompt) - len(samples[row].response))
    return (rows[at : at + batch_size] for at in range(0, len(rows), batch_size))


def _check_samples(samples: Sequence[Sample], batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give 1 or more.")
    for row, each in enumerate(samples):
        if not each.prompt and each.response:
            where = f" ({each.source})" if each.source else ""
            raise ValueError(
                f"Sample {row}{where} has no prompt tokens: give at least a begin-of-text token."
            )


def _cut(sample: Sample, length: int) -> Sample:
    return replace(sample, response=sample.response[:length])


def _check_settings(rounds: int, max_completion_length: int) -> None:
    if rounds < 0:
        raise ValueError(f"rounds is {rounds}: give 0 (no revision) or more.")
    if max_completion_length < 1:
        raise ValueError(f"max_completion_length is {max_completion_length}: give 1 or more.")
