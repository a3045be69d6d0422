"""How a model reads responses beside its teacher: the references, and what both of them wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from redistill.evaluation.answers import Tell
from redistill.evaluation.exposure import Curve, answer_divergences, excess_error
from redistill.evaluation.kept import Keep, digest, fingerprint
from redistill.runlog import read, write_whole
from redistill.sample import Sample
from redistill.scoring import score

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Readers:
    """The model, and the teacher beside it: the model itself where it is the teacher, None where there is none."""

    model: PreTrainedModel
    teacher: PreTrainedModel | None
    vocabulary: int
    batch_size: int

    def settings(self) -> dict[str, Any]:
        """Which models read, over which vocabulary."""
        teacher = None if self.teacher is None else fingerprint(self.teacher)
        return {"model": fingerprint(self.model), "teacher": teacher, "vocabulary": self.vocabulary}


def read_references(
    readers: Readers, samples: Sequence[Sample], keep: Keep, tell: Tell
) -> list[dict[str, Any]]:
    """Of each sample with a response: index, tokens, and over these in nats kl (to the teacher) and nll.

    kl is 0 for the teacher itself, by identity, and None without one.
    """
    asked = {index: sample for index, sample in enumerate(samples) if sample.response}
    content = digest([*_prompts(sample), sample.response] for sample in asked.values())
    settings = {**readers.settings(), "references": content}
    kept = keep.lines(keep.references, lambda record: record["index"], settings)
    for rows in _by_length(asked, readers.batch_size):
        tell("reading the references", 0)
        if not kept.holds(rows):
            scores = score(
                readers.model,
                readers.teacher or readers.model,
                [asked[index] for index in rows],
                vocabulary=readers.vocabulary,
                teacher_token="argmax",
                generator=None,
                batch_size=len(rows),
            )
            kept.append(
                {
                    "index": index,
                    "tokens": len(asked[index].response),
                    "kl": _divergence(readers, found.kl),
                    "nll": -_sum(found.student_log_likelihood),
                }
                for index, found in zip(rows, scores, strict=True)
            )
        tell("reading the references", len(rows))
    kept.sort(lambda record: record["index"])
    return kept.records


def read_exposure(
    readers: Readers,
    samples: Sequence[Sample],
    written: Mapping[str, Sequence[tuple[int, ...]]],
    keep: Keep,
    tell: Tell,
) -> Curve:
    """The curve of excess accumulated error, which is kept too.

    written: the answers of "student" and "teacher" to the same `samples`.
    """
    assert readers.teacher is not None
    prompts = [prompt for sample in samples for prompt in _prompts(sample)]
    content = digest([prompts, written["student"], written["teacher"]])
    settings = {**readers.settings(), "answers": content}
    kept = keep.lines(keep.exposure, lambda record: (record["prefixes"], record["index"]), settings)
    for prefixes, answers in written.items():
        answered = {
            index: replace(sample, response=answer, origin="rollout")
            for index, (sample, answer) in enumerate(zip(samples, answers, strict=True))
        }
        for rows in _by_length(answered, readers.batch_size):
            tell("exposure bias", 0)
            if not kept.holds((prefixes, index) for index in rows):
                found = answer_divergences(
                    readers.model,
                    readers.teacher,
                    [answered[index] for index in rows],
                    vocabulary=readers.vocabulary,
                    batch_size=len(rows),
                )
                kept.append(
                    {"prefixes": prefixes, "index": index, "kl": kl}
                    for index, kl in zip(rows, found, strict=True)
                )
            tell("exposure bias", len(rows))
    kept.sort(kept.key)
    # Beyond what a tenth of the answers reach, single long ones would decide.
    curve = excess_error(
        *([r["kl"] for r in kept.records if r["prefixes"] == who] for who in ("student", "teacher")),
        at_least=max(1, len(samples) // 10),
    )
    if keep.exposure is not None:
        write_whole(curve_path(keep.exposure), json.dumps(asdict(curve)) + "\n")
    return curve


def reference_divergences(path: Path) -> list[float]:
    """KL to the teacher per token of every reference that was read with one, in the order of the prompts (nats):
    a row of what `significance.paired_bootstrap` takes."""
    records = [record for record in read(path) if record.get("kl") is not None]
    return [record["kl"] / record["tokens"] for record in sorted(records, key=lambda record: record["index"])]


def curve_path(path: Path) -> Path:
    """exposure.jsonl -> exposure.json, the curve made of it."""
    return path.with_suffix(".json")


def _divergence(readers: Readers, kl: Tensor) -> float | None:
    if readers.teacher is None:
        return None
    return 0.0 if readers.teacher is readers.model else _sum(kl)


def _prompts(sample: Sample) -> list[tuple[int, ...]]:
    """The student's, and the teacher's if it has one of its own."""
    return [sample.prompt, *filter(None, [sample.teacher_prompt])]


def _by_length(samples: Mapping[int, Sample], batch_size: int) -> list[list[int]]:
    """Their keys in batches of like length, the longest first."""
    rows = sorted(samples, key=lambda row: -len(samples[row].prompt) - len(samples[row].response))
    return [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]


def _sum(values: Tensor) -> float:
    return float(values.double().sum())
