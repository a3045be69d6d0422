"""What the student minimises: the weighted terms, each divided by its count over the whole optimizer step.

    L = w_sft * L_SFT(references) + w_token * L_token + w_span * L_span        (arXiv 2407.10068)
      + w_policy * L_policy                                                    (MiniLLM, arXiv 2306.08543)

Temperature is applied here, once. The clip network of DAC-KL is a part of the objective, with parameters of its
own; the student stays a plain model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from redistill.batch import Batch, Counts, Row, collate
from redistill.config import ObjectiveSettings
from redistill.losses import (
    ClipNetwork,
    adaptive_kl,
    alpha_beta,
    cross_entropy,
    dac_terms,
    forward_kl,
    jensen_shannon,
    policy_gradient,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    span_correlation,
    todi,
    total_variation,
)
from redistill.losses.chunked import Stats, chunked
from redistill.losses.f_divergences import (
    FDivergence,
    forward_kl_parts,
    jensen_shannon_parts,
    reverse_kl_parts,
    skewed_forward_kl_parts,
    skewed_reverse_kl_parts,
    total_variation_parts,
)
from redistill.models import Head, head_of, hidden_states
from redistill.sample import Sample

Divergence = Callable[[Tensor, Tensor], Tensor]


class Written(NamedTuple):
    """What the policy gradient needs of written tokens: `behaviour` and `advantages`, [n] each (see `Sample`)."""

    behaviour: Tensor
    advantages: Tensor


class Objective(nn.Module):
    """The terms on one slice of logits. Its parameters are the clip network's, if one learns."""

    def __init__(self, settings: ObjectiveSettings, generator: torch.Generator | None = None):
        super().__init__()
        self.settings, dac = settings, settings.dac
        learns = settings.token_loss == "dac_kl" and dac.learnable and settings.token_weight > 0
        self.clip = ClipNetwork(dac.hidden, dac.top_k, generator=generator) if learns else None

    def forward(
        self,
        student: Tensor,
        teacher: Tensor | None,
        targets: Tensor,
        spans: Tensor,
        sft: bool,
        counts: Counts,
        written: Written | None = None,
    ) -> tuple[Tensor, Stats]:
        """The weighted sum over `[n, V]` logits, divided by `counts`, and the terms' sums unweighted.

        teacher: None where nothing is distilled. targets, spans: [n]. sft: whether `targets` are fitted here.
        written: needed by the policy term only.
        Statistics: sums `sft`, `token`, `span`, `policy`; per token `kl` (forward, temperature 1, for monitoring),
        `teacher_log_likelihood` of the target, and for DAC-KL `lower, upper, retained_mass, retained_classes`.
        """
        weights, loss, stats = self.settings, student.new_zeros((), dtype=torch.float32), {}
        if sft and weights.sft_weight:
            stats["sft"] = cross_entropy(student, targets).sum()
            loss = loss + weights.sft_weight * stats["sft"] / counts.sft
        if teacher is None:
            return loss, stats
        stats.update(_monitor(student, teacher, targets))
        if weights.policy.weight and written is not None:
            chosen = -cross_entropy(student, targets)
            stats["policy"] = policy_gradient(chosen, *written, clip=weights.policy.clip).sum()
            loss = loss + weights.policy.weight * stats["policy"] / counts.token
        student, teacher = student / weights.temperature, teacher / weights.temperature
        if weights.token_weight:
            token, extra, more = self._token(student, teacher)
            stats.update(more, token=token.sum())
            loss = loss + weights.token_weight * (stats["token"] + extra) / counts.token
        if weights.span_weight and counts.span:
            stats["span"] = span_correlation(student, teacher, spans, distance=weights.span.distance).sum()
            loss = loss + weights.span_weight * stats["span"] / counts.span
        return loss, stats

    def _token(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor | float, Stats]:
        """The token loss [n], what only the clip network minimises besides, and statistics [n]."""
        dac = self.settings.dac
        if self.settings.token_loss != "dac_kl":
            return divergence(self.settings)(student, teacher), 0.0, {}
        if self.clip is not None:
            lower, upper = self.clip(student, teacher)
        else:
            lower = student.new_full((len(student),), dac.lower, dtype=torch.float32)
            upper = student.new_full((len(student),), dac.upper, dtype=torch.float32)
        terms = dac_terms(
            student,
            teacher,
            lower,
            upper,
            quantile=dac.quantile,
            rest=dac.rest,
            edge=dac.edge,
            keep_target=dac.keep_target,
            sharpness=dac.sharpness,
            parts=clipped_divergence(self.settings),
        )
        # Keeps the network from clipping everything away; it depends on teacher and levels alone.
        coverage = -dac.coverage * terms.retained_mass.clamp_min(1e-30).log().sum() if dac.coverage else 0.0
        stats = {
            "lower": lower,
            "upper": upper,
            "retained_mass": terms.retained_mass,
            "retained_classes": terms.retained_classes,
        }
        return terms.divergence, coverage, stats


def divergence(settings: ObjectiveSettings) -> Divergence:
    """The `[N, V], [N, V] -> [N]` function that `token_loss` names, with its setting bound."""
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


def clipped_divergence(settings: ObjectiveSettings) -> FDivergence:
    """The divergence that `dac.divergence` names, class by class, with `beta` or `alpha` bound."""
    table: dict[str, FDivergence] = {
        "forward_kl": forward_kl_parts,
        "reverse_kl": reverse_kl_parts,
        "jensen_shannon": jensen_shannon_parts(settings.beta),
        "skewed_forward_kl": skewed_forward_kl_parts(settings.alpha),
        "skewed_reverse_kl": skewed_reverse_kl_parts(settings.alpha),
        "total_variation": total_variation_parts,
    }
    return table[settings.dac.divergence]


@torch.no_grad()
def _monitor(student: Tensor, teacher: Tensor, targets: Tensor) -> Stats:
    return {
        "kl": forward_kl(student, teacher),
        "teacher_log_likelihood": -cross_entropy(teacher, targets),
    }


def batch_loss(
    objective: Objective,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Batch,
    counts: Counts,
    vocabulary: int,
) -> tuple[Tensor, Stats]:
    """Loss of one micro-batch, differentiable in student and clip network, and its statistics.

    `counts` are those of the whole optimizer step, so the losses of its micro-batches simply add up.
    """
    hidden = hidden_states(student, batch["input_ids"], batch["attention_mask"], batch["select"])
    seen = batch["distill_rows"]
    teacher_hidden = hidden[:0]
    if seen:
        ids, mask = batch["input_ids"][:seen], batch["attention_mask"][:seen]
        with torch.no_grad():
            teacher_hidden = hidden_states(teacher, ids, mask, batch["select"][: batch["distill_positions"]])
    student_head, teacher_head = head_of(student, vocabulary), head_of(teacher, vocabulary)

    def slice_loss(part: Tensor, index: int) -> tuple[Tensor, Stats]:
        start, stop, sft, distill = batch["slices"][index]
        teacher_logits = _frozen_logits(teacher_head, teacher_hidden[start:stop]) if distill else None
        targets, spans = batch["targets"][start:stop], batch["spans"][start:stop]
        written = Written(batch["behaviour"][start:stop], batch["advantages"][start:stop])
        return objective(student_head.logits(part), teacher_logits, targets, spans, sft, counts, written)

    parameters = [*student_head.parameters(), *objective.parameters()]
    return chunked(slice_loss, hidden, [(s.start, s.stop) for s in batch["slices"]], parameters)


@torch.no_grad()
def _frozen_logits(head: Head, hidden: Tensor) -> Tensor:
    return head.logits(hidden)


class TermWatch:
    """Speaks up once for a term that is not felt, and once for a clip network that clips everything away."""

    def __init__(self, settings: ObjectiveSettings, patience: int = 100, share: float = 0.01):
        self._weights = {
            "sft": settings.sft_weight,
            "token": settings.token_weight,
            "span": settings.span_weight,
        }
        self._patience, self._share = patience, share
        self._small = dict.fromkeys(self._weights, 0)
        self._said: set[str] = set()

    def update(self, record: Mapping[str, float]) -> list[str]:
        """Look at one step's terms (as logged, unweighted); the warnings that are due now."""
        sizes = {name: abs(w * record[name]) for name, w in self._weights.items() if w and name in record}
        due: dict[str, str] = {}
        for name, size in sizes.items():
            small = size < self._share * max(sizes.values())
            self._small[name] = self._small[name] + 1 if small else 0
            if self._small[name] >= self._patience:
                due[name] = (
                    f"the {name} term has been under {self._share:.0%} of the largest for {self._patience} steps: "
                    f"it is hardly felt. Raise objective.{name}_weight, or set it to 0 and save its time."
                )
        if record.get("retained_classes", 2.0) <= 1.01:
            due["clip"] = (
                "the clip network keeps only the target class: raise objective.dac.coverage (or lower "
                "objective.dac.learning_rate), or fix the levels with objective.dac.learnable: false."
            )
        new = [text for name, text in due.items() if name not in self._said]
        self._said |= set(due)
        return new


@torch.no_grad()
def reference_scores(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    samples: Sequence[Sample],
    vocabulary: int,
    batch_size: int,
    slice_size: int = 256,
) -> dict[str, float]:
    """How the student reads given responses: `kl` to the teacher (forward, nats per token) and `nll`, the mean
    negative log-likelihood per response token (end of text included); `tokens` is their number."""
    sums = {"kl": 0.0, "nll": 0.0, "tokens": 0.0}
    device = next(student.parameters()).device
    training = student.training
    student.eval()
    ordered = sorted((s for s in samples if s.response), key=lambda s: len(s.prompt) + len(s.response))
    for start in range(0, len(ordered), batch_size):
        rows = [Row(s, (-1,) * len(s.response), True, True) for s in ordered[start : start + batch_size]]
        batch = collate(rows, 0, slice_size)
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        select, targets = batch["select"].to(device), batch["targets"].to(device)
        hidden = [hidden_states(model, ids, mask, select) for model in (student, teacher)]
        heads = [head_of(model, vocabulary) for model in (student, teacher)]
        for piece in batch["slices"]:
            at = slice(piece.start, piece.stop)
            q, p = (head.logits(part[at]) for head, part in zip(heads, hidden, strict=True))
            sums["kl"] += forward_kl(q, p).double().sum().item()
            sums["nll"] += cross_entropy(q, targets[at]).double().sum().item()
        sums["tokens"] += len(batch["targets"])
    student.train(training)
    tokens = max(sums["tokens"], 1.0)
    return {"kl": sums["kl"] / tokens, "nll": sums["nll"] / tokens, "tokens": sums["tokens"]}
