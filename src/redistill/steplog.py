"""What one optimizer step did, as a flat record: pure functions of the step's samples, batches and statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from redistill.batch import Batch, Counts
from redistill.chat import decode_response
from redistill.config import ObjectiveSettings
from redistill.losses.chunked import Stats, merge
from redistill.offsets import token_ends
from redistill.rollout import Drawn
from redistill.sample import Sample

PER_TOKEN = (
    "kl",
    "teacher_log_likelihood",
    "aligned",
    "lower",
    "upper",
    "retained_mass",
    "retained_classes",
)


@dataclass(frozen=True)
class Trained:
    """What a process went through in one step, or several together.

    loss: the sum over micro-batches. tokens: response tokens that the student read. samples: those distilled on, in
    the order in which the per-token statistics stand. seconds: up to now.
    """

    loss: float
    tokens: int
    samples: tuple[Sample, ...]
    stats: Stats
    seconds: float


def trained_on(
    batches: Sequence[Batch], stats: Sequence[Stats], losses: Sequence[Tensor], seconds: float
) -> Trained:
    """The micro-batches of one process, with their statistics and losses."""
    rows = [row for batch in batches for row in batch["rows"][: batch["distilled"]]]
    return Trained(
        float(sum(losses, torch.zeros(()))),
        sum(len(batch["targets"]) for batch in batches),
        tuple(row.sample for row in rows),
        {name: value.cpu() for name, value in merge(stats).items()},
        seconds,
    )


def together(parts: Sequence[Trained]) -> Trained:
    """Of all ranks; the seconds are the first one's."""
    return Trained(
        sum(part.loss for part in parts),
        sum(part.tokens for part in parts),
        tuple(sample for part in parts for sample in part.samples),
        merge([part.stats for part in parts]),
        parts[0].seconds,
    )


def step_record(drawn: Drawn, trained: Trained, counts: Counts, eos: frozenset[int]) -> dict[str, Any]:
    """Terms per token (nats) or per phrase, the clip's means, and what SCRG did. eos: the ids that end an answer."""
    stats = trained.stats
    record: dict[str, Any] = {}
    divisors = {"sft": counts.sft, "token": counts.token, "span": counts.span, "policy": counts.token}
    for name, divisor in divisors.items():
        if name in stats and divisor:
            record[name] = float(stats[name]) / divisor
    record |= {name: float(stats[name].float().mean()) for name in PER_TOKEN if name in stats}
    record["student_tokens"] = trained.tokens
    record |= {"sft_tokens": counts.sft, "distilled_tokens": counts.token, "spans": counts.span}
    return record | _answers_summary(list(drawn.student.values()), list(_scored(trained)), eos)


def _scored(trained: Trained) -> Iterator[tuple[Sample, Tensor, Tensor]]:
    """(sample, KL [T], teacher log-likelihood [T]) of every distilled row, from the step's own forward."""
    if "kl" not in trained.stats:
        return
    lengths = [len(sample.response) for sample in trained.samples]
    kl, likelihood = (trained.stats[name].split(lengths) for name in ("kl", "teacher_log_likelihood"))
    yield from zip(trained.samples, kl, likelihood, strict=True)


def _answers_summary(
    answers: Sequence[Sample], scored: Sequence[tuple[Sample, Tensor, Tensor]], eos: frozenset[int]
) -> dict[str, float]:
    fresh = [answer for answer in answers if answer.origin == "rollout"]
    revised = [answer for answer in fresh if answer.edits]
    record: dict[str, float] = {
        "student_samples": len(answers),
        "replayed": len(answers) - len(fresh),
    }
    if not fresh:
        return record
    record["share_cut"] = sum(answer.response[-1] not in eos for answer in fresh) / len(fresh)
    record["share_revised"] = len(revised) / len(fresh)
    record["share_agreed"] = sum(answer.agreed for answer in fresh) / len(fresh)
    if revised:
        record["error_position"] = _mean([s.edits[-1].position / len(s.edits[-1].before) for s in revised])
        record["kl_at_error_before"] = _mean([s.edits[-1].kl for s in revised])
        record["distinct_2_before"] = _mean([distinct_n(s.edits[0].before, 2) for s in revised])
        record["distinct_2_after"] = _mean([distinct_n(s.response, 2) for s in revised])
    after = [(s, kl, ll) for s, kl, ll in scored if s.edits and s.origin == "rollout"]
    if after:
        record["kl_at_error_after"] = _mean([float(kl[s.edits[-1].position]) for s, kl, _ in after])
        record["teacher_gain"] = _mean([float(ll.mean()) - s.edits[0].log_likelihood for s, _, ll in after])
    return record


def revision_records(trained: Trained, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """One record per freshly revised answer: texts, the last edit, and the teacher's view before and after."""
    for sample, kl, likelihood in _scored(trained):
        if not sample.edits or sample.origin != "rollout":
            continue
        yield revision_record(sample, kl, likelihood, tokenizer)


def revision_record(
    sample: Sample, kl: Tensor, likelihood: Tensor, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The record of a revised answer. kl, likelihood: [T], of its tokens as they are now."""
    edit = sample.edits[-1]
    return {
        "source": sample.source,
        "prompt": decode_response(sample.prompt, tokenizer),
        "prompt_ids": list(sample.prompt),
        "before": decode_response(edit.before, tokenizer),
        "after": decode_response(sample.response, tokenizer),
        "before_ends": token_ends(edit.before, tokenizer),
        "after_ends": token_ends(sample.response, tokenizer),
        "position": edit.position,
        "rejected": edit.rejected,
        "replacement": edit.replacement,
        "rejected_text": str(tokenizer.decode([edit.rejected])),
        "replacement_text": str(tokenizer.decode([edit.replacement])),
        "before_ids": list(edit.before),
        "after_ids": list(sample.response),
        "kl_before": edit.kl,
        "kl_before_tokens": list(edit.kl_tokens),
        "kl_after": [round(value, 4) for value in kl.tolist()],
        "log_likelihood_before": edit.log_likelihood,
        "log_likelihood_after": float(likelihood.mean()),
    }


def distinct_n(ids: Sequence[int], n: int) -> float:
    """The share of different ones among the n-grams of `ids` (Li et al. 2016); 1 where there is none."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class StepWatch:
    """Speaks up once for a term that is not felt, a clip network that clips everything away, and a student that no
    longer ends its answers."""

    def __init__(self, settings: ObjectiveSettings, patience: int = 100, share: float = 0.01, cut: int = 20):
        self._weights = {
            "sft": settings.sft_weight,
            "token": settings.token_weight,
            "span": settings.span_weight,
        }
        self._patience, self._share, self._cut = patience, share, cut
        self._small = dict.fromkeys(self._weights, 0)
        self._endless = 0
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
        if "share_cut" in record:
            self._endless = self._endless + 1 if record["share_cut"] == 1 else 0
        if self._endless >= self._cut:
            due["endless"] = (
                f"in {self._cut} steps with own answers the student has ended none before the limit: it may "
                "unlearn to stop. Raise rollout.max_completion_length, or keep objective.sft_weight above 0."
            )
        new = [text for name, text in due.items() if name not in self._said]
        self._said |= set(due)
        return new
