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
from redistill.losses.span_correlation import span_correlation
from redistill.models import head_of, hidden_states
from redistill.objective import Objective
from redistill.offsets import token_ends
from redistill.projection import projection_of
from redistill.sample import Sample
from redistill.teachers.signal import Hidden, Teacher, TopK

VIEWS, POSITIONS, CLASSES = 20, 8, 20
# Positions whose logits exist at once.
_BLOCK = 32

Logits = Callable[[Tensor], tuple[Tensor, Tensor]]


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
) -> dict[str, Any] | None:
    """The record of one answer; its keys are in docs/run-folder.md. spans: one number per response token, or none.

    Looked at are the `POSITIONS` where teacher and student differ most, and the last correction. None where the
    teacher tells no more than its most probable ids.
    """
    started = time.perf_counter()
    spans = spans or (-1,) * len(sample.response)
    signal = pair.teacher.signal([sample])
    if isinstance(signal, TopK):
        return None
    with answering(pair.student):
        logits = _reader(sample, pair, signal, objective)
        kl = torch.cat([_kl(*logits(rows)) for rows in torch.arange(len(sample.response)).split(_BLOCK)])
        gaps = _gaps(logits, spans, objective)
        chosen = set(kl.nan_to_num(0.0).topk(min(POSITIONS, len(kl))).indices.tolist())
        chosen |= {sample.edits[-1].position} if sample.edits else set()
        positions = _positions(sorted(chosen), sample, kl, logits, objective, tokenizer)
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


def _reader(sample: Sample, pair: Pair, signal: Hidden | Tensor, objective: Objective) -> Logits:
    """A function from places in the response to the logits of student and teacher there."""
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
    student, teacher = reads(own), reads(signal)

    def logits(rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, enabled=False):
            return student(rows.to(device)), teacher(rows.to(device))

    return logits


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Forward KL at temperature 1, as steps.jsonl has it."""
    both = distributions(student, teacher)
    return torch.linalg.vecdot(both.p, both.log_p - both.log_q).cpu()


def _gaps(logits: Logits, spans: Sequence[int], objective: Objective) -> list[float | None]:
    """The correlation distance of each token and the next where both belong to one phrase."""
    gaps: list[float | None] = [None] * len(spans)
    pairs = [i for i, (a, b) in enumerate(zip(spans, spans[1:], strict=False)) if a == b >= 0]
    warmth, distance = objective.settings.temperature, objective.settings.span.distance
    for at in range(0, len(pairs), _BLOCK // 2):
        firsts = torch.tensor(pairs[at : at + _BLOCK // 2])
        student, teacher = (each / warmth for each in logits(torch.stack((firsts, firsts + 1), 1).flatten()))
        # Every pair as a phrase of its own.
        alone = torch.arange(len(firsts), device=student.device).repeat_interleave(2)
        found = span_correlation(student, teacher, alone, distance=distance)
        for place, gap in zip(firsts.tolist(), found.tolist(), strict=True):
            gaps[place] = _short(gap)
    return gaps


def _positions(
    places: Sequence[int],
    sample: Sample,
    kl: Tensor,
    logits: Logits,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """The distributions at some places, as the token loss sees them."""
    warmth = objective.settings.temperature
    both = distributions(*(each / warmth for each in logits(torch.tensor(places))))
    clip = _clipping(both, objective)
    found = []
    for n, place in enumerate(places):
        record: dict[str, Any] = {
            "position": place,
            "token": str(tokenizer.decode([sample.response[place]])),
            "kl": round(float(kl[place]), 4),
        }
        if clip is not None:
            m, p, q = clip.m[n], both.p[n], both.q[n]
            record |= {
                "lower": _short(clip.lower[n]),
                "upper": _short(clip.upper[n]),
                "divergence": _short(clip.divergence[n]),
                "retained_mass": _short((m * p).sum()),
                "retained_classes": _short(m.sum()),
                "bucket_teacher": _short(((1 - m) * p).sum()),
                "bucket_student": _short(((1 - m) * q).sum()),
            }
        found.append(record | _classes(both, n, None if clip is None else clip.m[n], tokenizer))
    return found


class _Clipping(NamedTuple):
    """`lower`, `upper` and `divergence` (nats), [n] each, and the mask `m` [n, V]."""

    lower: Tensor
    upper: Tensor
    m: Tensor
    divergence: Tensor


def _clipping(both: Distributions, objective: Objective) -> _Clipping | None:
    """How DAC-KL sees some positions; None where it is not the token loss."""
    classes = Elementwise(objective.settings.model_copy(update={"compile": False})).clipped
    if classes is None or not objective.settings.token_weight:
        return None
    (lower, upper), clip = objective.levels_and_clip(both)
    return _Clipping(lower, upper, clip.m, classes(both, clip.m).divergence)


def _classes(
    both: Distributions, row: int, m: Tensor | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Any]]:
    """The most probable ids of either model, the teacher's favourites first."""
    p, q, most = both.p[row], both.q[row], min(CLASSES, both.p.shape[1])
    ids = torch.cat((p.topk(most).indices, q.topk(most).indices)).unique()
    ids = ids[p[ids].argsort(descending=True, stable=True)]
    listed: dict[str, list[Any]] = {
        "classes": [str(tokenizer.decode([index])) for index in ids.tolist()],
        "teacher": [_short(value) for value in p[ids].tolist()],
        "student": [_short(value) for value in q[ids].tolist()],
    }
    return listed if m is None else listed | {"kept": [_short(value) for value in m[ids].tolist()]}


def _short(value: float | Tensor) -> float:
    return float(f"{float(value):.5g}")
