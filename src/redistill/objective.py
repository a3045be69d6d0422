"""What the student minimises: the weighted terms, each divided by its count over the whole optimizer step.

    L = w_sft * L_SFT(references) + w_token * L_token + w_span * L_span        (arXiv 2407.10068)
      + w_policy * L_policy                                                    (MiniLLM, arXiv 2306.08543)

Temperature is applied here, once. The clip network of DAC-KL is a part of the objective, with parameters of its
own; the student stays a plain model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from redistill.batch import Batch, Counts, joined, mark
from redistill.config import ObjectiveSettings
from redistill.fused import Elementwise
from redistill.losses import (
    ClipNetwork,
    adaptive_kl,
    alpha_beta,
    forward_kl,
    jensen_shannon,
    policy_gradient,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    todi,
    total_variation,
)
from redistill.losses.chunked import Block, Part, Stats, chunked
from redistill.losses.dac_kl import Clip, clip_of, clipped
from redistill.losses.divergences import Distributions, log_probabilities
from redistill.losses.span_correlation import span_terms
from redistill.losses.truncated import fold_logs, unfold, with_room
from redistill.models import head_of, hidden_states
from redistill.projection import projection_of, source_of
from redistill.teachers.signal import Teacher, TopK
from redistill.wrapped import gather_head, is_sharded

Divergence = Callable[[Tensor, Tensor], Tensor]


class Written(NamedTuple):
    """What the policy gradient needs of written tokens: `behaviour` and `advantages`, [n] each (see `Sample`)."""

    behaviour: Tensor
    advantages: Tensor


class Objective(nn.Module):
    """The terms on one block of logits. Its parameters are the clip network's, if one learns."""

    def __init__(self, settings: ObjectiveSettings, generator: torch.Generator | None = None):
        super().__init__()
        self.settings, dac = settings, settings.dac
        learns = settings.token_loss == "dac_kl" and dac.learnable and settings.token_weight > 0
        self._fused = Elementwise(settings)
        self.clip = ClipNetwork(dac.hidden, dac.top_k, generator=generator) if learns else None

    @torch.no_grad()
    def forward(
        self,
        student: Tensor,
        teacher: Tensor | TopK | None,
        targets: Tensor,
        spans: Tensor,
        sft: bool,
        counts: Counts,
        written: Written | None = None,
    ) -> Part:
        """The weighted sum over `[n, V]` logits, divided by `counts`; its gradients; and the terms' sums unweighted.

        Finite for all logits below +inf: where a formula is infinite (a class that one bars and the other does not),
        it is what `divergences.LOG_FLOOR` makes of it.
        Each term says what it wants of log q, and log-softmax is gone back through once for all of them.

        teacher: logits; or its most probable classes, and then the student is put into these and the tail too; or
        None where nothing is distilled. targets, spans: [n]. sft: whether `targets` are fitted here.
        written: needed by the policy term only.
        Statistics: sums `sft`, `token`, `span`, `policy`; per token `kl` (forward, temperature 1, for monitoring),
        `teacher_log_likelihood` of the target, for DAC-KL `lower, upper, retained_mass, retained_classes`, and of a
        teacher with another tokenizer `aligned`: 1 where it says something.
        """
        weights, stats = self.settings, Stats()
        plain = _View(student, teacher, self._fused)
        loss, by_parameters = plain.log_q.new_zeros(()), [None] * len(list(self.parameters()))
        if sft and weights.sft_weight:
            loss += self._sft(plain, targets, weights.sft_weight / counts.sft, stats)
        if teacher is None:
            return Part(loss, plain.by_logits(), by_parameters, stats)
        stats["kl"] = torch.linalg.vecdot(plain.both.p, plain.both.log_p - plain.both.log_q)
        classes = teacher.class_of(targets) if isinstance(teacher, TopK) else targets[:, None]
        stats["teacher_log_likelihood"] = plain.both.log_p.gather(1, classes)[:, 0]
        if isinstance(teacher, TopK) and teacher.gaps is not None:
            stats["aligned"] = teacher.told.float()
        if weights.policy.weight and written is not None:
            loss += self._policy(plain, targets, written, weights.policy.weight / counts.token, stats)
        warmth = weights.temperature
        if warmth == 1.0:
            view = plain
        elif isinstance(teacher, TopK):
            raise ValueError(
                "objective.temperature must be 1: a teacher's tail is known at temperature 1 alone."
            )
        else:
            view = _View(student / warmth, teacher / warmth, self._fused)
        if weights.token_weight:
            more, by_parameters = self._token(view, weights.token_weight / counts.token, stats)
            loss += more
        if weights.span_weight and counts.span:
            loss += self._span(view, spans, weights.span_weight / counts.span, stats)
        by_logits = plain.by_logits()
        if view is not plain:
            by_logits += view.by_logits() / warmth
        return Part(loss, by_logits, by_parameters, stats)

    # The terms: each adds to `view.wanted` and to `stats`, and returns its share of the loss.

    def _sft(self, view: _View, targets: Tensor, scale: float, stats: Stats) -> Tensor:
        chosen = view.log_q.gather(1, targets[:, None])
        stats["sft"] = -chosen.sum()
        view.wanted.scatter_add_(1, targets[:, None], torch.full_like(chosen, -scale))
        return scale * stats["sft"]

    def _policy(self, view: _View, targets: Tensor, written: Written, scale: float, stats: Stats) -> Tensor:
        chosen, clip = view.log_q.gather(1, targets[:, None]), self.settings.policy.clip
        value, slope = _slope(lambda own: policy_gradient(own[:, 0], *written, clip=clip), chosen)
        stats["policy"] = value.sum()
        view.wanted.scatter_add_(1, targets[:, None], scale * slope)
        return scale * stats["policy"]

    def _span(self, view: _View, spans: Tensor, scale: float, stats: Stats) -> Tensor:
        terms = span_terms(*view.in_place(), spans, self.settings.span.distance)
        stats["span"] = terms.gaps.sum()
        for row in (terms.first, terms.first + 1):
            view.wanted.index_add_(0, row, terms.by_pair, alpha=scale)
        return scale * stats["span"]

    def _token(self, view: _View, scale: float, stats: Stats) -> tuple[Tensor, Sequence[Tensor | None]]:
        """And the gradients of the clip network, for what it minimises: this and the coverage term."""
        settings, dac = self.settings, self.settings.dac
        if settings.token_loss != "dac_kl":
            value, by_log_q = (self._fused.whole or _by_autograd(settings))(view.both)
            stats["token"] = value.sum()
            view.by_class.add_(by_log_q, alpha=scale)
            return scale * stats["token"], []
        with torch.enable_grad():
            levels, clip = self.levels_and_clip(view.both, view.tail)
        assert self._fused.clipped is not None
        found = clipped(view.both, clip, self._fused.clipped(view.both, clip.m))
        stats["token"] = found.divergence.sum()
        stats["lower"], stats["upper"] = (level.detach().float() for level in levels)
        stats["retained_mass"], stats["retained_classes"] = found.mass, clip.m.sum(-1)
        view.by_class.add_(found.by_log_q, alpha=scale)
        loss = scale * stats["token"]
        if self.clip is None:
            return loss, []
        # Coverage keeps the network from clipping everything away; it is no part of the student's loss.
        mass = found.mass.clamp_min(1e-30)
        by_moving = found.by_moving - dac.coverage * found.mass_by_moving / mass[clip.row]
        return loss, torch.autograd.grad(clip.moving, list(self.clip.parameters()), scale * by_moving)

    def levels_and_clip(
        self, both: Distributions, tail: int | None = None
    ) -> tuple[tuple[Tensor, Tensor], Clip]:
        """The quantile levels, [n] each, and what they keep. tail: of how many classes the last one is made."""
        dac, n = self.settings.dac, len(both.log_q)
        fixed = both.log_q.new_full((n,), dac.lower), both.log_q.new_full((n,), dac.upper)
        levels = fixed if self.clip is None else self.clip.levels(both, tail is not None)
        return levels, clip_of(both, levels, dac.quantile, dac.edge, dac.keep_target, dac.sharpness, tail)


class _View:
    """Student and teacher at one temperature, and what the terms want of log q (as if its classes were free).

    log_q, q, wanted: over the vocabulary. both, by_class: over the classes that the teacher tells apart: the same, or
    for a `TopK` those it kept and the tail, which stands for `tail` classes.
    """

    def __init__(self, student: Tensor, teacher: Tensor | TopK | None, fused: Elementwise):
        self._to_logits, self._folded, self.tail = fused.to_logits, None, None
        if isinstance(teacher, Tensor):
            self.both = fused.distributions(student, teacher)
            self.log_q, self.q = self.both.log_q, self.both.q
        else:
            self.log_q = log_probabilities(student)
            self.q = self.log_q.exp()
        self.wanted = self.by_class = torch.zeros_like(self.log_q)
        if isinstance(teacher, TopK):
            self._ids, self._folded = teacher.ids, fold_logs(self.log_q, teacher.ids)
            self.both = fused.distributions(self._folded.logs, teacher.log_p)
            self.tail, self.by_class = (
                student.shape[1] - teacher.ids.shape[1],
                torch.zeros_like(self.both.log_q),
            )

    def in_place(self) -> tuple[Tensor, Tensor]:
        """p and q over the vocabulary: the classes that were kept, where they belong, and 0 for all else."""
        p, q = self.both.p, self.both.q
        if self._folded is None:
            return p, q
        empty = with_room(torch.zeros_like(self.q), 0.0)
        p, q = (empty.scatter(1, self._ids, each[:, :-1])[:, :-1] for each in (p, q))
        return p, q

    def by_logits(self) -> Tensor:
        if self._folded is not None:
            self.wanted += unfold(self.by_class, self._ids, self._folded.share)
        return self._to_logits(self.wanted, self.log_q, self.q)


def _by_autograd(settings: ObjectiveSettings) -> Callable[[Distributions], tuple[Tensor, Tensor]]:
    """The token loss [n] and its gradient for log q, for what is no f-divergence."""
    return lambda both: _slope(lambda log_q: divergence(settings)(log_q, both.log_p), both.log_q)


def _slope(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """A function's values and the gradient of their sum."""
    with torch.enable_grad():
        leaf = at.detach().requires_grad_()
        value = function(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), slope


def divergence(settings: ObjectiveSettings) -> Divergence:
    """The `[N, V], [N, V] -> [N]` function that `token_loss` names, with its setting bound: for autograd where
    there is no closed form, and what the closed forms are tested against."""
    beta, alpha = settings.beta, settings.alpha
    table: dict[str, Divergence] = {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "jensen_shannon": lambda q, p: jensen_shannon(q, p, beta),
        "skewed_forward_kl": lambda q, p: skewed_forward_kl(q, p, alpha),
        "skewed_reverse_kl": lambda q, p: skewed_reverse_kl(q, p, alpha),
        "adaptive_kl": adaptive_kl,
        "total_variation": total_variation,
        "todi": todi,
        "alpha_beta": lambda q, p: alpha_beta(q, p, alpha, beta),
    }
    return table[settings.token_loss]


# Elements of a block's [n, V] tensors: on a CPU they are to stay in the cache, elsewhere to fill the device.
_BLOCK = {"cpu": 2**20}
_BLOCK_ELSEWHERE = 2**25


def block_size(device: str, vocabulary: int) -> int:
    """How many positions go through the loss at once on a kind of device."""
    return max(1, _BLOCK.get(device, _BLOCK_ELSEWHERE) // vocabulary)


def batch_loss(
    objective: Objective,
    student: PreTrainedModel,
    teacher: Teacher,
    batch: Batch,
    counted: Callable[[], Counts],
    vocabulary: int,
    block: int | None = None,
) -> tuple[Tensor, Stats]:
    """Loss of one micro-batch, differentiable in student and clip network, and its statistics.

    counted: gives the counts of the whole optimizer step, so that the losses of its micro-batches simply add up. It
    and the phrases are asked for when both models have been given what to read: until then they may be looked for.
    block: the most positions that go through the loss at once; None: `block_size` of the device.
    """
    ids, select, where = batch["input_ids"], batch["select"], batch["position_ids"]
    hidden = hidden_states(student, ids, select, where)
    exact, distilled = objective.settings.float32_logits, batch["rows"][: batch["distilled"]]
    # Of a sharded teacher each rank needs the others, so that all must read with it or none.
    asked = bool(distilled) or is_sharded(teacher.model)
    signal = teacher.signal([row.sample for row in distilled]) if asked else None
    marks, counts = mark(batch), counted()
    slices = joined(marks.slices, block or block_size(hidden.device.type, vocabulary))

    def block_loss(logits: Tensor, teacher_logits: Tensor | None, index: int) -> Part:
        start, stop, sft, _ = slices[index]
        targets, spans = batch["targets"][start:stop], marks.spans[start:stop]
        written = Written(batch["behaviour"][start:stop], batch["advantages"][start:stop])
        return objective(logits, teacher_logits, targets, spans, sft, counts, written)

    head = head_of(student, vocabulary)
    gather_head(head.module)
    return chunked(
        block_loss,
        projection_of(head, hidden, trains=True, exact=exact),
        hidden,
        source_of(signal, hidden.device, exact=exact) if signal is not None else None,
        [Block(each.start, each.stop, each.distill) for each in slices],
        objective.settings.chunk_size,
        list(objective.parameters()),
    )
