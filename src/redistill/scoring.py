"""What teacher and student think of given responses, position by position: the ground that SCRG stands on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from redistill.generate import answering, draw_uniforms
from redistill.losses.divergences import LOG_FLOOR, log_probabilities
from redistill.losses.truncated import fold
from redistill.models import Head, head_of
from redistill.sample import Sample
from redistill.sampling import Sampling, sample
from redistill.teachers.local import reader_of, teacher_of
from redistill.teachers.reading import Reader
from redistill.teachers.signal import Signal, Teacher, TopK, at

TeacherToken = Literal["sample", "argmax"]


@dataclass(frozen=True)
class Score:
    """What teacher and student think of one response of `T` tokens; CPU tensors of shape [T].

    kl: d_i = KL(p_i || q_i) in nats, fp32, at least 0; 0 where the two distributions are the same. Over the classes
        that a truncated teacher tells apart: then never more than over all.
    teacher_token: t_i, the token of the teacher at the position, given the response before it.
    teacher_log_likelihood, student_log_likelihood: log p_i(y_i) and log q_i(y_i) in nats, of the response's own
        tokens.
    reward: log p_i(y_i) - log q_i(y_i) in nats (MiniLLM's, arXiv 2306.08543); over the same classes as kl.
    """

    kl: Tensor
    teacher_token: Tensor
    teacher_log_likelihood: Tensor
    student_log_likelihood: Tensor
    reward: Tensor

    def continued(self, first: int, behind: Score) -> Score:
        """This score up to the position `first`, and `behind` from there on."""
        pairs = zip(self.fields(), behind.fields(), strict=True)
        return Score(*(torch.cat((one[:first], other)) for one, other in pairs))

    def fields(self) -> tuple[Tensor, ...]:
        """All of them, in order."""
        return (
            self.kl,
            self.teacher_token,
            self.teacher_log_likelihood,
            self.student_log_likelihood,
            self.reward,
        )


def score(
    student: nn.Module,
    teacher: nn.Module | Teacher,
    samples: Sequence[Sample],
    *,
    vocabulary: int,
    teacher_token: TeacherToken,
    generator: torch.Generator | None,
    temperature: float = 1.0,
    batch_size: int,
    chunk: int = 256,
    packed: bool = False,
) -> list[Score]:
    """Compare student and teacher at every response position: one `Score` a sample, in order. No gradients.

    vocabulary: the number of ids that both models share.
    teacher_token: "sample" draws t_i from p_i at `temperature` (which touches nothing else), with one uniform
        number per position taken from `generator` beforehand; "argmax" takes the most probable one.
    batch_size: the most samples read at once. chunk: positions whose logits exist at once, so that memory is
        about 4 * chunk * vocabulary numbers of 4 bytes, whatever the batch. packed: whether both models `packs`.
    Errors: ValueError for an empty prompt (nothing then predicts the first token) and a batch size under 1.
    """
    check_samples(samples, batch_size)
    how = Sampling(temperature=temperature if teacher_token == "sample" else 0.0)
    uniforms = position_uniforms(samples, how, generator)
    nothing = torch.empty(0)
    scores = [Score(nothing, nothing.long(), nothing, nothing, nothing)] * len(samples)
    for rows, found in scored(
        student, teacher, samples, vocabulary, how, uniforms, batch_size, chunk=chunk, packed=packed
    ):
        for row, each in zip(rows, found, strict=True):
            scores[row] = each
    return scores


def reference_scores(
    student: nn.Module,
    teacher: nn.Module | Teacher,
    samples: Sequence[Sample],
    vocabulary: int,
    batch_size: int,
) -> dict[str, float]:
    """How the student reads given responses: `kl` to the teacher (forward, nats per token) and `nll`, the mean
    negative log-likelihood per response token (end of text included); `tokens` is their number."""
    how = {"vocabulary": vocabulary, "batch_size": batch_size, "generator": None}
    scores = score(student, teacher, samples, teacher_token="argmax", **how)
    tokens = sum(len(each.kl) for each in scores)
    kl = sum(each.kl.double().sum().item() for each in scores)
    nll = -sum(each.student_log_likelihood.double().sum().item() for each in scores)
    return {"kl": kl / max(tokens, 1), "nll": nll / max(tokens, 1), "tokens": float(tokens)}


def mean_scores(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """`reference_scores` of several lots of samples as those of all."""
    tokens = sum(part["tokens"] for part in parts)
    means = {
        name: sum(part[name] * part["tokens"] for part in parts) / max(tokens, 1) for name in ("kl", "nll")
    }
    return {**means, "tokens": tokens}


def position_uniforms(
    samples: Sequence[Sample], how: Sampling, generator: torch.Generator | None
) -> tuple[Tensor, ...]:
    """One number in [0, 1) for every response position, sample by sample, drawn in one call."""
    lengths = [len(each.response) for each in samples]
    drawn = draw_uniforms(1, sum(lengths), how, generator)[0]
    return drawn.split(lengths)


def scored(
    student: nn.Module,
    teacher: nn.Module | Teacher,
    samples: Sequence[Sample],
    vocabulary: int,
    how: Sampling,
    uniforms: Sequence[Tensor],
    batch_size: int,
    *,
    chunk: int = 256,
    packed: bool = False,
) -> Iterator[tuple[list[int], list[Score]]]:
    """Batch by batch: which samples, and their scores. packed: as in `Scorer`."""
    for rows in batches(samples, batch_size):
        scorer = Scorer(student, teacher, vocabulary, how, chunk=chunk, packed=packed)
        batch, start = [samples[row] for row in rows], [0] * len(rows)
        yield rows, scorer.score(batch, start, start, [uniforms[row] for row in rows])


class Scorer:
    """Scores one batch of responses, again and again as they are corrected.

    packed: for both models, see `packing.packs`; a `Teacher` knows for itself. keep: the student remembers what it
    reads; again: the teacher too, for there will be more readings.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher,
        vocabulary: int,
        how: Sampling,
        *,
        chunk: int = 256,
        packed: bool = False,
        keep: bool = False,
        again: bool = False,
    ):
        self._student, self._head = student, head_of(student, vocabulary)
        self._how, self._chunk = how, chunk
        self.own = Reader(student, packed=packed, keep=keep)
        self._theirs = reader_of(teacher_of(teacher, vocabulary, packed), again)

    def score(
        self,
        samples: Sequence[Sample],
        rows: Sequence[int],
        first: Sequence[int],
        uniforms: Sequence[Tensor],
    ) -> list[Score]:
        """The scores of each response from the position `first` on; its numbers in [0, 1) too are for those only.

        rows, first: see `Reader.read`.
        """
        said = torch.cat([torch.tensor(s.response[at:]) for s, at in zip(samples, first, strict=True)])
        with answering(self._student):
            hidden = self.own.read(samples, rows, first)
            signal = self._theirs.read(samples, rows, first)
            found = _compare(
                hidden, self._head, signal, said, torch.cat([*uniforms]), how=self._how, chunk=self._chunk
            )
        return list(_split(found, [len(s.response) - at for s, at in zip(samples, first, strict=True)]))


def _compare(
    hidden: Tensor, head: Head, signal: Signal, said: Tensor, uniform: Tensor, *, how: Sampling, chunk: int
) -> Score:
    """`Score` of all N positions of a batch; logits exist for `chunk` positions at a time."""
    said, uniform = said.to(hidden.device), uniform.to(hidden.device)
    parts = []
    for start in range(0, len(said), chunk):
        cut = slice(start, start + chunk)
        log_q = log_probabilities(head.logits(hidden[cut]))
        own = log_q.gather(-1, said[cut, None]).squeeze(-1)
        kl, token, theirs, reward = _beside(at(signal, cut), log_q, said[cut], uniform[cut], how)
        parts.append([each.cpu() for each in (kl, token, theirs, own, reward)])
    return Score(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _beside(
    theirs: Tensor | TopK, log_q: Tensor, said: Tensor, uniform: Tensor, how: Sampling
) -> tuple[Tensor, ...]:
    """KL, the teacher's token, its log-likelihood of what was said, and by how much that is more than the student's;
    over the classes that it tells apart."""
    theirs = theirs.to(log_q.device)
    if isinstance(theirs, TopK):
        log_p, log_q = theirs.log_p.clamp(min=LOG_FLOOR), fold(log_q, theirs.ids)
        classes = theirs.class_of(said)
        # The tail is no token.
        token = theirs.ids.gather(-1, sample(log_p[:, :-1], uniform, how)[:, None]).squeeze(-1)
        # Where it says nothing there is nothing to correct.
        token = token if theirs.gaps is None else torch.where(theirs.told, token, said)
    else:
        logits = theirs.float()
        log_p, classes, token = log_probabilities(logits), said[:, None], sample(logits, uniform, how)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp(min=0.0)
    said_p, said_q = (each.gather(-1, classes).squeeze(-1) for each in (log_p, log_q))
    return kl, token, said_p, said_p - said_q


def _split(whole: Score, lengths: list[int]) -> Iterator[Score]:
    return (Score(*part) for part in zip(*(each.split(lengths) for each in whole.fields()), strict=True))


def batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[int]]:
    """Indices of the samples that have a response, in batches of like length, the longest first."""
    rows = [row for row, each in enumerate(samples) if each.response]
    rows.sort(key=lambda row: -len(samples[row].prompt) - len(samples[row].response))
    return (rows[at : at + batch_size] for at in range(0, len(rows), batch_size))


def check_samples(samples: Sequence[Sample], batch_size: int) -> None:
    """ValueError for a response without a prompt (nothing predicts its first token), and a batch size under 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give 1 or more.")
    for row, each in enumerate(samples):
        if not each.prompt and each.response:
            where = f" ({each.source})" if each.source else ""
            raise ValueError(
                f"Sample {row}{where} has no prompt tokens: give at least a begin-of-text token."
            )
