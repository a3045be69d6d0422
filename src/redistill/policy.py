"""MiniLLM's view of an answer: under what it was written, and how good what follows each token is.

Reverse KL of whole answers, KL(q || p) over sequences, has a gradient of two parts (Gu et al. 2024, arXiv
2306.08543): each position's own divergence, which is a token loss like any other, and what a token does to the
rest of the answer. The second part is a policy gradient; what it needs of an answer is worked out here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from redistill.config import PolicySettings
from redistill.sample import Sample
from redistill.scoring import Score


def with_advantages(
    samples: Sequence[Sample], scores: Sequence[Score], settings: PolicySettings, teacher_mix: float
) -> list[Sample]:
    """The samples with `behaviour` and `advantages`; scores: how both models read them, at temperature 1.

    behaviour: log((1 - a) q(y_t) + a p(y_t)) with a = `teacher_mix`, in nats.
    advantages: R_t = sum over t' > t (t' >= t with `own_token`) of log p(y_t') - log q(y_t'), divided by the number
    of those t' with `length_normalization`. `whiten`: over all tokens given, to mean 0 and deviation 1. Without
    `own_token` nothing follows the last token: it is left out of that and stays at 0, as shifted it would pass for a
    good one, at every end and every cut.
    """
    behaviour = [_mixture(score, teacher_mix) for score in scores]
    returns = [rewards_to_go(score, settings) for score in scores]
    if settings.whiten:
        returns = _whitened(returns, 0 if settings.own_token else 1)
    return [
        replace(sample, behaviour=tuple(written.tolist()), advantages=tuple(gain.tolist()))
        for sample, written, gain in zip(samples, behaviour, returns, strict=True)
    ]


def rewards_to_go(score: Score, settings: PolicySettings) -> Tensor:
    """[T]: the rewards, summed (or averaged) over the tokens after each, or from each on."""
    reward, others = score.reward.double(), 0 if settings.own_token else 1
    found = reward.flip(0).cumsum(0).flip(0) - others * reward
    if settings.length_normalization:
        found = found / (torch.arange(len(reward), 0, -1) - others).clamp(min=1)
    return found


def _whitened(returns: Sequence[Tensor], left_out: int) -> list[Tensor]:
    """To mean 0 and deviation 1 over all tokens but the last `left_out` of each answer, which stay as they are."""
    ends = [max(0, len(each) - left_out) for each in returns]
    every = torch.cat([each[:end] for each, end in zip(returns, ends, strict=True)])
    if len(every) < 2:
        return list(returns)
    mean, deviation = every.mean(), every.std() + 1e-8
    return [
        torch.cat(((each[:end] - mean) / deviation, each[end:]))
        for each, end in zip(returns, ends, strict=True)
    ]


def _mixture(score: Score, teacher_mix: float) -> Tensor:
    own = score.student_log_likelihood.double()
    if teacher_mix == 0:
        return own
    return torch.logaddexp(
        own + math.log1p(-teacher_mix), score.teacher_log_likelihood.double() + math.log(teacher_mix)
    )
