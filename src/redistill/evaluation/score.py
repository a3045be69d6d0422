"""What an evaluation says in numbers. Plain arithmetic: no model, no text, no file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Summary(NamedTuple):
    """mean: over seeds, of each seed's mean. std: of the seeds' means; None without a second seed."""

    mean: float | None
    std: float | None


@dataclass(frozen=True)
class EvaluationRow:
    """One model in the table and in `results.json`; None is "not measured".

    parameters: tied weights counted once.
    rougeL_greedy, rougeL_mean, rougeL_std: ROUGE-L F in percent: of greedy answers; of sampled ones, mean and
        sample standard deviation over seeds.
    kl_to_teacher: KL(teacher || model) on the reference responses, nats per token; 0 for the teacher itself.
    perplexity: exp of the mean negative log-likelihood per token of the reference responses.
    tokens_per_second: tokens written per second of writing, all passes together.
    distinct_2, mean_tokens, share_cut: of the sampled answers, mean over seeds (of the greedy ones without
        seeds): different over all pairs of neighbouring tokens; tokens per answer, end of text included;
        share of answers that met the length limit before their end.
    """

    name: str
    parameters: int
    rougeL_greedy: float | None
    rougeL_mean: float | None
    rougeL_std: float | None
    kl_to_teacher: float | None
    perplexity: float | None
    tokens_per_second: float | None
    distinct_2: float | None = None
    mean_tokens: float | None = None
    share_cut: float | None = None


def summarize(per_seed: Sequence[Sequence[float]]) -> Summary:
    """Mean and standard deviation over seeds of each seed's mean score.

    per_seed: one list of scores per seed, of any unit. The deviation divides by the number of seeds less one:
    the seeds are a sample of all that could have been drawn. Errors: ValueError for a seed without scores.
    """
    if any(not scores for scores in per_seed):
        raise ValueError("A seed has no scores: every seed must answer at least one prompt.")
    means = [statistics.fmean(scores) for scores in per_seed]
    return Summary(
        statistics.fmean(means) if means else None,
        statistics.stdev(means) if len(means) > 1 else None,
    )


def distinct_n(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """Different n-grams over all n-grams, of all sequences together (Li et al., 2016): 0 to 1.

    1: nothing is ever said twice; near 0: loops; 0 also where no sequence has `n` items. It falls with the
    amount of text: compare equal numbers of answers only. Errors: ValueError for `n` under 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}: give 1 or more.")
    grams = [tuple(each[at : at + n]) for each in sequences for at in range(len(each) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def mean_length(sequences: Sequence[Sequence[Hashable]]) -> float:
    """Items per sequence; 0 without a sequence."""
    return statistics.fmean(len(each) for each in sequences) if sequences else 0.0


def share_cut(answers: Sequence[Sequence[int]], eos: Collection[int]) -> float:
    """The share of answers that do not end with one of `eos`: 0 to 1; 0 without an answer."""
    return statistics.fmean(not each or each[-1] not in eos for each in answers) if answers else 0.0


def perplexity(nll: float) -> float:
    """exp of the mean negative log-likelihood per token (nats): 1 when all was foreseen; may be infinite."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
