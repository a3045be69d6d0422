"""What one optimizer step did, as a flat record: pure functions of the step's samples, batches and statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from redistill.batch import Batch, Counts
from redistill.chat import decode_response
from redistill.losses.chunked import Stats
from redistill.rollout import Drawn
from redistill.sample import Sample

PER_TOKEN = ("kl", "teacher_log_likelihood", "lower", "upper", "retained_mass", "retained_classes")


def step_record(drawn: Drawn, batches: Sequence[Batch], stats: Stats, counts: Counts) -> dict[str, Any]:
    """Terms per token (nats) or per phrase, the clip's means, and what SCRG did."""
    record: dict[str, Any] = {}
    divisors = {"sft": counts.sft, "token": counts.token, "span": counts.span, "policy": counts.token}
    for name, divisor in divisors.items():
        if name in stats and divisor:
            record[name] = float(stats[name]) / divisor
    record |= {name: float(stats[name].float().mean()) for name in PER_TOKEN if name in stats}
    record["student_tokens"] = sum(len(batch["targets"]) for batch in batches)
    record |= {"sft_tokens": counts.sft, "distilled_tokens": counts.token, "spans": counts.span}
    return record | _revision_summary(list(drawn.student.values()), list(_scored(batches, stats)))


def _scored(batches: Sequence[Batch], stats: Stats) -> Iterator[tuple[Sample, Tensor, Tensor]]:
    """(sample, KL [T], teacher log-likelihood [T]) of every distilled row, from the step's own forward."""
    if "kl" not in stats:
        return
    rows = [row for batch in batches for row in batch["rows"][: batch["distilled"]]]
    lengths = [len(row.sample.response) for row in rows]
    kl, likelihood = stats["kl"].cpu(), stats["teacher_log_likelihood"].cpu()
    yield from zip((row.sample for row in rows), kl.split(lengths), likelihood.split(lengths), strict=True)


def _revision_summary(
    answers: Sequence[Sample], scored: Sequence[tuple[Sample, Tensor, Tensor]]
) -> dict[str, float]:
    fresh = [answer for answer in answers if answer.origin == "rollout"]
    revised = [answer for answer in fresh if answer.edits]
    record: dict[str, float] = {
        "student_samples": len(answers),
        "replayed": len(answers) - len(fresh),
    }
    if not fresh:
        return record
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


def revision_records(
    batches: Sequence[Batch], stats: Stats, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """One record per freshly revised answer: texts, the last edit, and the teacher's view before and after."""
    for sample, kl, likelihood in _scored(batches, stats):
        if not sample.edits or sample.origin != "rollout":
            continue
        edit = sample.edits[-1]
        yield {
            "source": sample.source,
            "prompt": decode_response(sample.prompt, tokenizer),
            "prompt_ids": list(sample.prompt),
            "before": decode_response(edit.before, tokenizer),
            "after": decode_response(sample.response, tokenizer),
            "position": edit.position,
            "rejected": edit.rejected,
            "replacement": edit.replacement,
            "before_ids": list(edit.before),
            "after_ids": list(sample.response),
            "kl_before": edit.kl,
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
