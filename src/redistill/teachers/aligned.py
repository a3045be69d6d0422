"""A teacher with another tokenizer: it reads the same text in its own ids, and says what it would write in ours.

Where both tokenizers have a border in the text, a group of ids begins on either side (`alignment.py`): ours s_1 ..
s_k and theirs t_1 .. t_l. p is what the teacher says at its first id, and P = p(t_1) p(t_2 | t_1) .. the probability
that it writes what is written. Each of its ids v writes a text that our tokenizer has as some ids e(v). So the
teacher writes s_1 .. s_k with P, e(t_1) and not that with p(t_1) - P, and e(v) with p(v) for any other v; what comes
behind is not known. At s_i it says, of all that begins with s_1 .. s_{i-1}, how much goes on with each id: the
`top_k` most probable ones, s_i among them. All else, and where it is not known how it goes on, is the tail.
docs/teacher.md compares it with GOLD (TRL) and ULD (arXiv 2402.12030).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from redistill.losses.divergences import LOG_FLOOR
from redistill.losses.quantile import top_classes
from redistill.pieces import Pieces
from redistill.sample import Sample
from redistill.teachers.alignment import Aligned, align, codes_of
from redistill.teachers.local import LocalTeacher
from redistill.teachers.signal import Hidden, TopK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Positions of the teacher whose logits exist at once.
CHUNK = 64


class _Place(NamedTuple):
    """A group in a batch: its first position among all of ours, its ids, its positions [start, stop) among all that
    the teacher read, and whether a response begins with it."""

    position: int
    ours: tuple[int, ...]
    start: int
    stop: int
    first: bool


class AlignedTeacher:
    """`inner` reads, all of its ids counting. ours, theirs: the two tokenizers. vocabulary: the student's ids. top_k:
    of them kept at a position."""

    def __init__(self, inner: LocalTeacher, ours: Pieces, theirs: Pieces, vocabulary: int, top_k: int):
        self.vocabulary, self._inner, self._top_k = vocabulary, inner, min(top_k, vocabulary)
        sizes = vocabulary, inner.vocabulary
        inside = codes_of(ours, theirs, *sizes, first=False)
        bordered = ours.bordered or theirs.bordered
        self._codes = {
            False: inside,
            True: codes_of(ours, theirs, *sizes, first=True) if bordered else inside,
        }

        # A sample is read for its scores and for the loss, a reference in every epoch.
        @lru_cache(maxsize=4096)
        def aligned(response: tuple[int, ...]) -> Aligned:
            return align(response, ours, theirs)

        self._align = aligned

    @property
    def model(self) -> PreTrainedModel:
        """See `Teacher`."""
        return self._inner.model

    def signal(self, samples: Sequence[Sample]) -> TopK:
        """See `Teacher`. The teacher's own prompt, in its ids, must be there in every sample."""
        assert all(each.teacher_prompt for each in samples), "there is no prompt in the teacher's ids"
        found = [self._align(each.response) for each in samples]
        read = [
            replace(each, response=as_theirs.theirs) for each, as_theirs in zip(samples, found, strict=True)
        ]
        said = self._inner.signal([each for each in read if each.response])
        device, size = said.hidden.device, self.vocabulary
        total = sum(len(each.response) for each in samples)
        ids = torch.full((total, self._top_k), size, device=device)
        log_p = torch.full((total, self._top_k + 1), LOG_FLOOR, device=device)
        log_p[:, -1] = 0.0
        self._codes = {first: codes.to(device) for first, codes in self._codes.items()}
        theirs = torch.tensor([token for each in read for token in each.response], device=device)
        for part in _parts(_places(samples, found)):
            self._tell(part, said, theirs, ids, log_p)
        return TopK(ids, log_p, gaps=size)

    @torch.no_grad()
    def _tell(self, part: Sequence[_Place], said: Hidden, theirs: Tensor, ids: Tensor, log_p: Tensor) -> None:
        """Write what is said of some groups to their rows of `ids` and `log_p`."""
        device, start = theirs.device, part[0].start

        def numbers(values: Iterable[int]) -> Tensor:
            return torch.tensor([*values], device=device, dtype=torch.long)

        logs = said.head.logits(said.hidden[start : part[-1].stop]).float().log_softmax(-1)
        read = theirs[start : part[-1].stop, None]
        inside = numbers(at - start for each in part for at in range(each.start, each.stop))
        group = numbers(g for g, each in enumerate(part) for _ in range(each.start, each.stop))
        log_whole = logs.new_zeros(len(part)).index_add_(0, group, logs.gather(1, read)[inside, 0])
        began, first = numbers(each.start - start for each in part), numbers(each.position for each in part)
        for at in range(max(len(each.ours) for each in part)):
            for opening in {each.first for each in part}:
                chosen = [g for g, each in enumerate(part) if len(each.ours) > at and each.first == opening]
                if not chosen:
                    continue
                some = numbers(chosen)
                ours = numbers(token for g in chosen for token in part[g].ours[: at + 1]).view(
                    len(chosen), -1
                )
                codes = self._codes[opening]
                rows = logs[began[some]], read[began[some]], log_whole[some, None]
                found = _mapped(*rows, ours, codes, self.vocabulary, self._top_k)
                ids[first[some] + at], log_p[first[some] + at] = found


def _mapped(
    logs: Tensor, read: Tensor, log_whole: Tensor, ours: Tensor, codes: Tensor, size: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """What is said at the i-th position of groups: ids and log-probabilities as of a `TopK`.

    logs: [G, V'] the teacher's at the first one. read: [G, 1] t_1. log_whole: [G, 1] log P. ours: [G, i] s_1 .. s_i.
    codes: e, [V', W] into `size` ids; `size` behind the last.
    """
    before, wanted = ours[:, :-1], ours[:, -1:]
    p, whole = logs.exp(), log_whole.exp()
    p.scatter_(1, read, (p.gather(1, read) - whole).clamp(min=0.0))
    for at, token in enumerate(before.unbind(1)):
        p *= codes[:, at] == token[:, None] if at < codes.shape[1] else 0.0
    at = before.shape[1]
    column = codes[:, at] if at < codes.shape[1] else torch.full_like(codes[:, 0], size)
    mass = p.new_zeros(len(p), size + 1).scatter_add_(1, column.expand(len(p), -1), p)
    mass.scatter_add_(1, wanted, whole)
    # Of less than fp32 can hold the logarithm is still known.
    log_wanted = torch.maximum(mass.gather(1, wanted).log(), log_whole)
    best, ids = top_classes(mass[:, :size].scatter(1, wanted, 2.0), top_k)
    tail = mass.scatter(1, ids, 0.0).sum(-1, keepdim=True).log()
    log_p = torch.cat((log_wanted, mass.gather(1, ids[:, 1:]).log(), tail), dim=1)
    return ids.masked_fill(best <= 0, size), log_p.log_softmax(-1).clamp_(min=LOG_FLOOR)


def _places(samples: Sequence[Sample], found: Sequence[Aligned]) -> Iterator[_Place]:
    position = start = 0
    for sample, said in zip(samples, found, strict=True):
        for group in said.groups:
            ours = slice(*group.ours)
            where = (start + at for at in group.theirs)
            yield _Place(position + ours.start, sample.response[ours], *where, first=ours.start == 0)
        position, start = position + len(sample.response), start + len(said.theirs)


def _parts(places: Iterable[_Place]) -> Iterator[list[_Place]]:
    """Runs of groups that `CHUNK` positions of the teacher hold, or one that they do not."""
    part = list[_Place]()
    for place in places:
        if part and place.stop - part[0].start > CHUNK:
            yield part
            part = []
        part.append(place)
    if part:
        yield part
