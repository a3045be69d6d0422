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
    """One model on one set, in the table and in `results.json`; None is "not measured".

    parameters: tied weights counted once.
    rougeL_greedy, rougeL_mean, rougeL_std: ROUGE-L F in percent: of greedy answers; of sampled ones, mean and
        sample standard deviation over seeds.
    kl_to_teacher: KL(teacher || model) on the reference responses, nats per token; 0 for the teacher itself.
    perplexity: exp of the mean negative log-likelihood per token of the reference responses.
    tokens_per_second: tokens written per second of writing, all passes together.
    distinct_1, distinct_2, distinct_4, self_repetition, exact_match, mean_tokens, share_cut: of the sampled
        answers, mean over seeds (of the greedy ones without seeds). distinct_n: different over all runs of n
        tokens; self_repetition: see there, 4 tokens; exact_match: percent, see there; mean_tokens: per answer,
        end of text included; share_cut: share of answers that met the length limit before their end.
    exact_match_greedy: percent of the greedy answers.
    excess_error: ExAccErr in percent at 16 tokens (`exposure.py`); the curve is in the exposure file.
    set: the name of the set; None where the data has no name of its own.
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
    distinct_1: float | None = None
    distinct_4: float | None = None
    self_repetition: float | None = None
    exact_match: float | None = None
    exact_match_greedy: float | None = None
    excess_error: float | None = None
    set: str | None = None


def summarize(per_seed: Sequence[Sequence[float]]) -> Summary:
    """Mean and standard deviation over seeds of each seed's mean score.

    per_seed: one list of scores per seed, of any unit. The deviation divides by the number of seeds less one:
    the seeds are a sample of all that could have been drawn. Errors: ValueError for a seed without scores.
    """
    if any(not scores for scores in per_seed):
        raise ValueError("A seed has no scores: every seed must answer at least one prompt.")
    means = [statistics.fmean(scores) for scores in per_seed]
    return Summary(mean(means), statistics.stdev(means) if len(means) > 1 else None)


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return statistics.fmean(values) if values else None


def distinct_n(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """Different n-grams over all n-grams, of all sequences together (Li et al., 2016): 0 to 1.

    1: nothing is ever said twice; near 0: loops; 0 also where no sequence has `n` items. It falls with the
    amount of text: compare equal numbers of answers only. Errors: ValueError for `n` under 1.
    """
    grams = [gram for each in sequences for gram in _grams(each, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_repetition(sequences: Sequence[Sequence[Hashable]], n: int = 4) -> float | None:
    """The share of a sequence's n-grams that it said before itself, mean over the sequences that have one.

    1 - different / all n-grams of each sequence: seq-rep-n of Welleck et al. (arXiv 1908.04319; n = 4 there).
    0: no answer repeats itself; near 1: loops. None where no sequence has `n` items. Unlike `distinct_n` it
    does not fall with the number of answers. Errors: ValueError for `n` under 1.
    """
    grams = [found for each in sequences if (found := _grams(each, n))]
    return mean([1.0 - len(set(found)) / len(found) for found in grams])


def exactly(answer: str, references: Sequence[str]) -> bool:
    """Whether `answer` is one of `references`, but for white space: none at the ends, a blank for each run."""
    said = " ".join(answer.split())
    return any(said == " ".join(reference.split()) for reference in references)


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float | None:
    """The percent of answers that are exactly (see there) one of their references: 0 to 100; None of nothing."""
    return mean([100.0 * exactly(said, wanted) for said, wanted in zip(answers, references, strict=True)])


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


def _grams(sequence: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    if n < 1:
        raise ValueError(f"n is {n}: give 1 or more.")
    return [tuple(sequence[at : at + n]) for at in range(len(sequence) - n + 1)]
