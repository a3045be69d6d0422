"""Asks a model every prompt, greedily and with several seeds, and scores what it answers.

The models, the prompts and the references come in ready: no loading, no templates, no tables.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from redistill.chat import decode_response
from redistill.evaluation.rouge import RougeL
from redistill.evaluation.score import (
    EvaluationRow,
    distinct_n,
    mean_length,
    perplexity,
    share_cut,
    summarize,
)
from redistill.generate import Sampling, answering, generate
from redistill.models import parameter_count
from redistill.objective import reference_scores
from redistill.runlog import write_whole
from redistill.sample import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]
Seed = int | Literal["greedy"]


@dataclass(frozen=True)
class Pass:
    """One answer to every prompt, in the order of the prompts. scores: ROUGE-L of each, in percent."""

    seed: Seed
    answers: Sequence[tuple[int, ...]]
    texts: Sequence[str]
    scores: Sequence[float]
    seconds: float


class Reading(NamedTuple):
    """KL to the teacher in nats per token, and perplexity; both None where no sample has a response."""

    kl: float | None
    perplexity: float | None


def evaluate_model(
    name: str,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    samples: Sequence[Sample],
    references: Sequence[tuple[str, ...]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seeds: Sequence[int],
    temperature: float,
    top_p: float,
    greedy: bool,
    max_new_tokens: int,
    batch_size: int,
    eos: frozenset[int],
    vocabulary: int,
    answers_path: Path | None = None,
    progress: Progress | None = None,
    max_length: int | None = None,
) -> EvaluationRow:
    """Let `model` answer every prompt, once greedily if `greedy` and once per seed, and score it.

    teacher: None when `model` is the teacher itself; its divergence is then 0 by identity, not measured.
    samples: prompts, with the reference responses on which KL and perplexity are read; those without a
        response are only asked. references: the accepted answers of each sample, for ROUGE-L.
    max_new_tokens, max_length: the most tokens of an answer, and of prompt and answer together.
    answers_path: every answer as a line of JSON, replaced whole; one path per model.
    progress: called with (what is done now, passes done, passes in all), the references being the last pass.
    The same seeds give the same row but for `tokens_per_second`. No gradients; modes are left as found.
    Errors: ValueError without samples, for a sample without reference answers, for lists of unequal length.
    """
    _check_references(samples, references)
    tell = progress or (lambda *_: None)
    limits = [_limit(sample, max_new_tokens, max_length) for sample in samples]
    calls: list[tuple[Sampling, Sequence[Seed]]] = [(Sampling(0.0), ["greedy"])] if greedy else []
    calls += [(Sampling(temperature, top_p), seeds)] if seeds else []
    passes: list[Pass] = []
    for done, (sampling, runs) in enumerate(calls):
        what = (
            "greedy answers"
            if sampling.temperature == 0
            else f"sampled answers, seeds {', '.join(map(str, runs))}"
        )
        tell(what, done, len(calls) + 1)
        started = time.perf_counter()
        answers = _ask(model, samples, limits, sampling, runs, eos, batch_size, vocabulary)
        seconds = (time.perf_counter() - started) / len(runs)
        passes += _scored(runs, answers, references, seconds, tokenizer)
    tell("reading the references", len(calls), len(calls) + 1)
    reading = _read_references(model, teacher, samples, vocabulary, batch_size)
    if answers_path is not None:
        prompts = [str(tokenizer.decode(list(sample.prompt))) for sample in samples]
        _write_answers(answers_path, name, passes, prompts, references)
    tell("done", len(calls) + 1, len(calls) + 1)
    return _row(name, model, passes, eos, reading)


def _ask(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    limits: list[int],
    sampling: Sampling,
    runs: Sequence[Seed],
    eos: frozenset[int],
    batch_size: int,
    vocabulary: int,
) -> list[tuple[int, ...]]:
    """All answers of the first seed, then of the next; in one call, so that each prompt is read once."""
    return generate(
        model,
        [sample.prompt for sample in samples] * len(runs),
        limits=limits * len(runs),
        sampling=sampling,
        eos=eos,
        generator=None,
        batch_size=batch_size,
        vocabulary=vocabulary,
        uniforms=torch.cat([_uniforms(run, len(samples), max([0, *limits])) for run in runs]),
    )


def _scored(
    runs: Sequence[Seed],
    answers: Sequence[tuple[int, ...]],
    references: Sequence[tuple[str, ...]],
    seconds: float,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[Pass]:
    """The answers of several seeds, one seed after the other, as a `Pass` each."""
    rouge, count = RougeL(), len(references)
    for place, run in enumerate(runs):
        own = answers[place * count : (place + 1) * count]
        texts = [decode_response(answer, tokenizer) for answer in own]
        scores = [rouge.score(text, wanted) for text, wanted in zip(texts, references, strict=True)]
        yield Pass(run, own, texts, scores, seconds)


def _uniforms(run: Seed, rows: int, steps: int) -> Tensor:
    """A seed's own random numbers, the same whatever other seeds are answered with it."""
    if run == "greedy":
        return torch.zeros(rows, steps)
    return torch.rand(rows, steps, generator=torch.Generator().manual_seed(run))


def _limit(sample: Sample, max_new_tokens: int, max_length: int | None) -> int:
    return max_new_tokens if max_length is None else min(max_new_tokens, max_length - len(sample.prompt))


def _read_references(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    samples: Sequence[Sample],
    vocabulary: int,
    batch_size: int,
) -> Reading:
    """How the model reads the samples' responses."""
    other = model if teacher is None else teacher
    with answering(model), answering(other):
        read = reference_scores(model, other, samples, vocabulary, batch_size)
    if not read["tokens"]:
        return Reading(None, None)
    return Reading(0.0 if teacher is None else read["kl"], perplexity(read["nll"]))


def _row(
    name: str,
    model: PreTrainedModel,
    passes: Sequence[Pass],
    eos: frozenset[int],
    reading: Reading,
) -> EvaluationRow:
    greedy = [each for each in passes if each.seed == "greedy"]
    sampled = [each for each in passes if each.seed != "greedy"]
    rouge = summarize([each.scores for each in sampled])
    shown = sampled or greedy
    seconds = sum(each.seconds for each in passes)
    written = sum(len(answer) for each in passes for answer in each.answers)
    return EvaluationRow(
        name=name,
        parameters=parameter_count(model),
        rougeL_greedy=summarize([each.scores for each in greedy]).mean,
        rougeL_mean=rouge.mean,
        rougeL_std=rouge.std,
        kl_to_teacher=reading.kl,
        perplexity=reading.perplexity,
        tokens_per_second=written / seconds if seconds > 0 else None,
        distinct_2=_mean([distinct_n(_without_end(each.answers, eos), 2) for each in shown]),
        mean_tokens=_mean([mean_length(each.answers) for each in shown]),
        share_cut=_mean([share_cut(each.answers, eos) for each in shown]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _without_end(answers: Sequence[tuple[int, ...]], eos: frozenset[int]) -> list[tuple[int, ...]]:
    return [answer[:-1] if answer and answer[-1] in eos else answer for answer in answers]


def _write_answers(
    path: Path,
    name: str,
    passes: Sequence[Pass],
    prompts: Sequence[str],
    references: Sequence[tuple[str, ...]],
) -> None:
    """name, seed or "greedy", index, prompt (control tokens shown), answer, references, rougeL."""

    def lines() -> Iterator[str]:
        for each in passes:
            for index, prompt in enumerate(prompts):
                record = {
                    "name": name,
                    "seed": each.seed,
                    "index": index,
                    "prompt": prompt,
                    "answer": each.texts[index],
                    "references": list(references[index]),
                    "rougeL": each.scores[index],
                }
                yield json.dumps(record, ensure_ascii=False) + "\n"

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(lines()))


def _check_references(samples: Sequence[Sample], references: Sequence[tuple[str, ...]]) -> None:
    if not samples:
        raise ValueError("There is nothing to evaluate: give at least one prompt with a reference answer.")
    if len(samples) != len(references):
        raise ValueError(f"{len(samples)} prompts but {len(references)} lists of references: give one each.")
    for index, (sample, wanted) in enumerate(zip(samples, references, strict=True)):
        if not wanted:
            where = sample.source or f"prompt {index}"
            raise ValueError(f"{where} has no reference answer to compare with: add one or leave it out.")
