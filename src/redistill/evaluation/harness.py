"""Asks a model every prompt, greedily and with several seeds, and scores what it answers and how it reads.

The models, the prompts and the references come in ready: no loading, no templates, no tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from redistill.evaluation.answers import (
    Pass,
    Progress,
    Questions,
    Writing,
    answer_key,
    ask_all,
    counting,
)
from redistill.evaluation.exposure import AT
from redistill.evaluation.kept import Keep, fingerprint
from redistill.evaluation.readings import Readers, read_exposure, read_references
from redistill.evaluation.score import (
    EvaluationRow,
    distinct_n,
    mean,
    mean_length,
    perplexity,
    self_repetition,
    share_cut,
    summarize,
)
from redistill.models import parameter_count, positions_of
from redistill.sample import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    keep: Keep | None = None,
    progress: Progress | None = None,
    max_length: int | None = None,
    teacher_answers: Sequence[tuple[int, ...]] = (),
) -> EvaluationRow:
    """Let `model` answer every prompt, once greedily if `greedy` and once per seed, and score it.

    teacher: measures KL; `model` itself where it is the teacher (0 by identity); None measures none.
    samples: prompts, with the reference responses on which KL and perplexity are read; those without a
        response are only asked. A teacher reads and answers its own prompts where samples have them, in its own row
        too. references: the accepted answers of each sample, for ROUGE-L.
    max_new_tokens, max_length: the most tokens of an answer, and of prompt and answer together.
    teacher_answers: the teacher's answers to the first prompts with the first seed, for exposure bias; none:
        that is not measured, nor without a seed, nor of the teacher.
    keep: where everything is kept; what lies there already is not made again.
    progress: called with (what is done now, prompts done, prompts in all).
    The same seeds give the same row but for `tokens_per_second`, broken off or not. No gradients; modes are
    left as found.
    Errors: ValueError without samples, for a sample without reference answers, for lists of unequal length, for
    prompts that leave no room for an answer, for more tokens than a model has positions, and those of `KeptLines`.
    """
    _check_references(samples, references)
    samples = [each.for_teacher() for each in samples] if model is teacher else samples
    limits = [_limit(sample, max_new_tokens, max_length) for sample in samples]
    _check_lengths(samples, limits, [each for each in (model, teacher) if each is not None])
    writing = Writing(tuple(seeds), temperature, top_p, greedy, batch_size, eos, vocabulary)
    theirs = teacher_answers[: len(samples)] if seeds and teacher is not None and teacher is not model else ()
    passes = len(writing.seeds) + writing.greedy
    prompts = passes * len(samples) + sum(1 for each in samples if each.response) + 2 * len(theirs)
    keep, tell = keep or Keep(), counting(progress, prompts)
    questions = Questions(samples, references, limits)
    made = {"model": fingerprint(model), **questions.settings(), **writing.settings()}
    kept = keep.lines(keep.answers, answer_key, made)
    answered = ask_all(model, questions, writing, tokenizer, kept, name=name, set_name=keep.set, tell=tell)
    readers = Readers(model, teacher, vocabulary, batch_size)
    row = _row(name, model, answered, eos, keep, read_references(readers, samples, keep, tell))
    if theirs:
        first = next(each.answers for each in answered if each.seed == writing.seeds[0])
        written = {"student": first[: len(theirs)], "teacher": theirs}
        curve = read_exposure(readers, samples[: len(theirs)], written, keep, tell)
        row = replace(row, excess_error=curve.at(AT))
    return row


def _limit(sample: Sample, max_new_tokens: int, max_length: int | None) -> int:
    return max_new_tokens if max_length is None else min(max_new_tokens, max_length - len(sample.prompt))


def _check_lengths(
    samples: Sequence[Sample], limits: Sequence[int], models: Sequence[PreTrainedModel]
) -> None:
    if max(limits) < 1:
        raise ValueError(
            "no prompt leaves room for an answer: allow more tokens of prompt and answer together."
        )
    longest = max(
        len(sample.prompt) + max(limit, len(sample.response))
        for sample, limit in zip(samples, limits, strict=True)
    )
    positions = min((known for each in models if (known := positions_of(each)) is not None), default=longest)
    if longest > positions:
        raise ValueError(
            f"prompt and answer together may have {longest} tokens, and the models have {positions} positions: lower "
            "max_new_tokens or max_prompt_length."
        )


def _row(
    name: str,
    model: PreTrainedModel,
    passes: Sequence[Pass],
    eos: frozenset[int],
    keep: Keep,
    reading: Sequence[dict[str, Any]],
) -> EvaluationRow:
    greedy = [each for each in passes if each.seed == "greedy"]
    sampled = [each for each in passes if each.seed != "greedy"]
    rouge = summarize([each.scores for each in sampled])
    shown = sampled or greedy
    said = [_without_end(each.answers, eos) for each in shown]
    repeated = [found for each in said if (found := self_repetition(each)) is not None]
    seconds = sum(each.seconds for each in passes)
    written = sum(len(answer) for each in passes for answer in each.answers)
    tokens = sum(record["tokens"] for record in reading)
    kl = [record["kl"] for record in reading if record["kl"] is not None]
    return EvaluationRow(
        name=name,
        parameters=parameter_count(model),
        rougeL_greedy=summarize([each.scores for each in greedy]).mean,
        rougeL_mean=rouge.mean,
        rougeL_std=rouge.std,
        kl_to_teacher=sum(kl) / tokens if kl else None,
        perplexity=perplexity(sum(record["nll"] for record in reading) / tokens) if tokens else None,
        tokens_per_second=written / seconds if seconds > 0 else None,
        distinct_2=mean([distinct_n(each, 2) for each in said]),
        mean_tokens=mean([mean_length(each.answers) for each in shown]),
        share_cut=mean([share_cut(each.answers, eos) for each in shown]),
        distinct_1=mean([distinct_n(each, 1) for each in said]),
        distinct_4=mean([distinct_n(each, 4) for each in said]),
        self_repetition=mean(repeated),
        exact_match=_percent(shown),
        exact_match_greedy=_percent(greedy),
        set=keep.set,
    )


def _percent(passes: Sequence[Pass]) -> float | None:
    return mean([100.0 * sum(each.exact) / len(each.exact) for each in passes])


def _without_end(answers: Sequence[tuple[int, ...]], eos: frozenset[int]) -> list[tuple[int, ...]]:
    return [answer[:-1] if answer and answer[-1] in eos else answer for answer in answers]


def _check_references(samples: Sequence[Sample], references: Sequence[tuple[str, ...]]) -> None:
    if not samples:
        raise ValueError("There is nothing to evaluate: give at least one prompt with a reference answer.")
    if len(samples) != len(references):
        raise ValueError(f"{len(samples)} prompts but {len(references)} lists of references: give one each.")
    for index, (sample, wanted) in enumerate(zip(samples, references, strict=True)):
        if not wanted:
            where = sample.source or f"prompt {index}"
            raise ValueError(f"{where} has no reference answer to compare with: add one or leave it out.")
