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
    advantages: R_t = sum over t' > t of log p(y_t') - log q(y_t'), divided by the number of those t' with
    `length_normalization`; 0 for the last token. `whiten`: over all tokens that others follow, to mean 0 and
    deviation 1; the last stays at 0, as shifted it would always pass for a good one: every end, and every cut.
    The authors' code counts the token itself in R_t too, although the single-step term already does, and so
    has no such zero; the paper (Eq. 5) and we do not.
    """
    behaviour = [_mixture(score, teacher_mix) for score in scores]
    returns = [rewards_to_go(score, settings.length_normalization) for score in scores]
    followed = torch.cat([each[:-1] for each in returns])
    if settings.whiten and len(followed) > 1:
        mean, deviation = followed.mean(), followed.std()
        returns = [
            torch.cat(((each[:-1] - mean) / (deviation + 1e-8), torch.zeros_like(each[-1:])))
            for each in returns
        ]
    return [
        replace(sample, behaviour=tuple(written.tolist()), advantages=tuple(gain.tolist()))
        for sample, written, gain in zip(samples, behaviour, returns, strict=True)
    ]


def rewards_to_go(score: Score, length_normalization: bool) -> Tensor:
    """[T]: the rewards, summed (or averaged) over the tokens after each."""
    reward = score.reward.double()
    after = reward.flip(0).cumsum(0).flip(0) - reward
    if length_normalization:
        after = after / torch.arange(len(reward) - 1, -1, -1).clamp(min=1)
    return after


def _mixture(score: Score, teacher_mix: float) -> Tensor:
    own = score.student_log_likelihood.double()
    if teacher_mix == 0:
        return own
    return torch.logaddexp(
        own + math.log1p(-teacher_mix), score.teacher_log_likelihood.double() + math.log(teacher_mix)
    )
