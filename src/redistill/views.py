"""Now and then one answer of a step, seen closely: what both models think of it, token by token.

It is read once more after the step, without gradients, dropout or random numbers, so that no run is another for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from redistill.batch import Row
from redistill.chat import decode_response
from redistill.fused import Elementwise
from redistill.generate import answering
from redistill.losses.divergences import Distributions, distributions
from redistill.losses.span_correlation import span_terms
from redistill.losses.truncated import fold
from redistill.models import head_of, hidden_states
from redistill.objective import Objective
from redistill.offsets import token_ends
from redistill.projection import projection_of
from redistill.sample import Sample
from redistill.teachers.signal import Hidden, Signal, Teacher, TopK

VIEWS, POSITIONS, CLASSES = 20, 8, 20
# Positions whose logits exist at once.
_BLOCK = 32


class Pair(NamedTuple):
    """Who is asked, and over how many ids."""

    student: nn.Module
    teacher: Teacher
    vocabulary: int


def due(before: float, now: float) -> bool:
    """Whether a step that took the run's progress (0 to 1) from one to the other is looked at: the first one, and
    then `VIEWS` of a run, evenly."""
    return before == 0 or int(before * VIEWS) < int(now * VIEWS)


def choose(rows: Sequence[Row], step: int) -> Row | None:
    """What is looked at of the rows of a step: an answer just revised, else just written, else replayed, else a
    reference; where there are several, another one from step to step. None where the teacher reads none of them."""
    seen = [row for row in rows if row.distill and row.sample.response]
    own = [row for row in seen if row.sample.origin != "reference"]
    fresh = [row for row in own if row.sample.origin == "rollout"]
    found = next(filter(None, ([row for row in fresh if row.sample.edits], fresh, own, seen)), [])
    return found[step % len(found)] if found else None


def view(
    sample: Sample, spans: Sequence[int], pair: Pair, objective: Objective, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The record of one answer; its keys are in docs/run-folder.md. spans: one number per response token, or none.

    Looked at are the `POSITIONS` where teacher and student differ most, and the last correction. Of a teacher that
    tells its most probable ids only, all numbers are over these and one class for the tail, as the losses have it.
    """
    started = time.perf_counter()
    spans = spans or (-1,) * len(sample.response)
    with answering(pair.student):
        reader = _reader(sample, pair, pair.teacher.signal([sample]), objective)
        blocks = torch.arange(len(sample.response)).split(_BLOCK)
        kl = torch.cat([_kl(reader(rows, 1.0).both) for rows in blocks])
        gaps = _gaps(reader, spans, objective, pair.vocabulary)
        chosen = set(kl.nan_to_num(0.0).topk(min(POSITIONS, len(kl))).indices.tolist())
        chosen |= {sample.edits[-1].position} if sample.edits else set()
        positions = _positions(sorted(chosen), sample, kl, reader, objective, pair, tokenizer)
    return {
        "source": sample.source,
        "origin": sample.origin,
        "prompt": decode_response(sample.prompt, tokenizer),
        "response": decode_response(sample.response, tokenizer),
        "ends": token_ends(sample.response, tokenizer),
        "kl": [round(value, 4) for value in kl.tolist()],
        "spans": list(spans),
        "gaps": gaps,
        "vocabulary": pair.vocabulary,
        "positions": positions,
        "seconds": time.perf_counter() - started,
    }


class _Seen(NamedTuple):
    """both: over the classes that the teacher tells apart, [n, C]. ids: [n, k], which they are but for the last, the
    tail, where the teacher tells its most probable ones only; V stands for none."""

    both: Distributions
    ids: Tensor | None

    def in_place(self, vocabulary: int) -> tuple[Tensor, Tensor]:
        """p and q over the vocabulary; 0 for what is in the tail, as the span loss has it."""
        if self.ids is None:
            return self.both.p, self.both.q
        empty = self.both.p.new_zeros(len(self.ids), vocabulary + 1)
        p, q = (empty.scatter(1, self.ids, each[:, :-1])[:, :-1] for each in (self.both.p, self.both.q))
        return p, q


# Places in the response and a temperature: what both models say there.
Reader = Callable[[Tensor, float], _Seen]


def _reader(sample: Sample, pair: Pair, signal: Signal, objective: Objective) -> Reader:
    device, first = next(pair.student.parameters()).device, len(sample.prompt) - 1
    ids = torch.tensor([(sample.prompt + sample.response)[:-1]], device=device)
    select = torch.arange(first, first + len(sample.response), device=device)
    exact = objective.settings.float32_logits

    def reads(said: Hidden | Tensor) -> Callable[[Tensor], Tensor]:
        if isinstance(said, Tensor):
            return lambda rows: said[rows].float()
        projection = projection_of(said.head, said.hidden, trains=False, exact=exact)
        return lambda rows: projection.logits(projection.project(said.hidden[rows])).float().clone()

    own = Hidden(hidden_states(pair.student, ids, select), head_of(pair.student, pair.vocabulary))
    student = reads(own)
    if isinstance(signal, TopK):
        told = signal.to(device)

        def folded(rows: Tensor, warmth: float) -> _Seen:
            assert warmth == 1.0, "a tail is known at temperature 1 alone"
            log_q = student(rows).log_softmax(-1)
            return _Seen(distributions(fold(log_q, told.ids[rows]), told.log_p[rows]), told.ids[rows])

        read = folded
    else:
        teacher = reads(signal)

        def whole(rows: Tensor, warmth: float) -> _Seen:
            return _Seen(distributions(student(rows) / warmth, teacher(rows) / warmth), None)

        read = whole

    def seen(rows: Tensor, warmth: float) -> _Seen:
        with torch.autocast(device.type, enabled=False):
            return read(rows.to(device), warmth)

    return seen


def _kl(both: Distributions) -> Tensor:
    """Forward KL at temperature 1, as steps.jsonl has it."""
    return torch.linalg.vecdot(both.p, both.log_p - both.log_q).cpu()


def _gaps(reader: Reader, spans: Sequence[int], objective: Objective, vocabulary: int) -> list[float | None]:
    """The correlation distance of each token and the next where both belong to one phrase."""
    gaps: list[float | None] = [None] * len(spans)
    pairs = [i for i, (a, b) in enumerate(zip(spans, spans[1:], strict=False)) if a == b >= 0]
    warmth, distance = objective.settings.temperature, objective.settings.span.distance
    for at in range(0, len(pairs), _BLOCK // 2):
        firsts = torch.tensor(pairs[at : at + _BLOCK // 2])
        p, q = reader(torch.stack((firsts, firsts + 1), 1).flatten(), warmth).in_place(vocabulary)
        # Every pair as a phrase of its own.
        alone = torch.arange(len(firsts), device=p.device).repeat_interleave(2)
        found = span_terms(p, q, alone, distance).gaps
        for place, gap in zip(firsts.tolist(), found.tolist(), strict=True):
            gaps[place] = _short(gap)
    return gaps


def _positions(
    places: Sequence[int],
    sample: Sample,
    kl: Tensor,
    reader: Reader,
    objective: Objective,
    pair: Pair,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """The distributions at some places, as the token loss sees them."""
    both, ids = reader(torch.tensor(places), objective.settings.temperature)
    clip = _clipping(both, objective, None if ids is None else pair.vocabulary - ids.shape[1])
    found = []
    for n, place in enumerate(places):
        record: dict[str, Any] = {
            "position": place,
            "token": str(tokenizer.decode([sample.response[place]])),
            "kl": round(float(kl[place]), 4),
        }
        m, p, q = None if clip is None else clip.m[n], both.p[n], both.q[n]
        if clip is not None and m is not None:
            record |= {
                "lower": _short(clip.lower[n]),
                "upper": _short(clip.upper[n]),
                "divergence": _short(clip.divergence[n]),
                "retained_mass": _short((m * p).sum()),
                "retained_classes": _short(m.sum()),
                "bucket_teacher": _short(((1 - m) * p).sum()),
                "bucket_student": _short(((1 - m) * q).sum()),
            }
        tokens = torch.arange(len(p), device=p.device) if ids is None else ids[n]
        if ids is not None:
            tail = pair.vocabulary - int((tokens != pair.vocabulary).sum())
            record |= {"tail": tail, "tail_teacher": _short(p[-1]), "tail_student": _short(q[-1])}
            record |= {} if m is None else {"tail_kept": _short(m[-1])}
        found.append(record | _classes(p, q, tokens, m, pair.vocabulary, tokenizer))
    return found


class _Clipping(NamedTuple):
    """`lower`, `upper` and `divergence` (nats), [n] each, and the mask `m` [n, V]."""

    lower: Tensor
    upper: Tensor
    m: Tensor
    divergence: Tensor


def _clipping(both: Distributions, objective: Objective, tail: int | None) -> _Clipping | None:
    """How DAC-KL sees some positions; None where it is not the token loss."""
    classes = Elementwise(objective.settings.model_copy(update={"compile": False})).clipped
    if classes is None or not objective.settings.token_weight:
        return None
    (lower, upper), clip = objective.levels_and_clip(both, tail)
    return _Clipping(lower, upper, clip.m, classes(both, clip.m).divergence)


def _classes(
    p: Tensor,
    q: Tensor,
    ids: Tensor,
    m: Tensor | None,
    vocabulary: int,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, list[Any]]:
    """The most probable ids of either model among those told apart, the teacher's favourites first."""
    told = (ids < vocabulary).nonzero()[:, 0]
    most = min(CLASSES, len(told))
    places = told[torch.cat([each[told].topk(most).indices for each in (p, q)]).unique()]
    places = places[p[places].argsort(descending=True, stable=True)]
    tokens = ids[places]
    listed: dict[str, list[Any]] = {
        "classes": [str(tokenizer.decode([index])) for index in tokens.tolist()],
        "teacher": [_short(value) for value in p[places].tolist()],
        "student": [_short(value) for value in q[places].tolist()],
    }
    return listed if m is None else listed | {"kept": [_short(value) for value in m[places].tolist()]}


def _short(value: float | Tensor) -> float:
    return float(f"{float(value):.5g}")
