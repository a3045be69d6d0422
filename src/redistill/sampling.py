"""From logits to one token: temperature, top-k, top-p and min-p, with random numbers that the caller brings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_NUCLEUS_AT_FIRST = 256  # tokens


@dataclass(frozen=True)
class Sampling:
    """How one token is drawn from a model's logits.

    temperature: the logits are divided by it; 0 takes the most probable token and ignores the rest.
    top_p: the smallest set of most probable tokens whose mass reaches `top_p`, with all that tie with the last of
    them; 1 keeps all.
    top_k: the `top_k` most probable tokens, with all that tie with the last of them; 0 keeps all.
    min_p: the tokens at least `min_p` times as probable as the most probable one; 0 keeps all.
    Applied in the order temperature, top_k, top_p (of what top_k left), min_p.
    Errors: ValueError for a value out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: give 0 (greedy) or a positive number.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(
                f"top_p is {self.top_p}: give a number over 0 and at most 1 (1 keeps all tokens)."
            )
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: give 0 (keeps all tokens) or a positive number.")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p is {self.min_p}: give a number from 0 (keeps all tokens) to 1.")


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Set to -inf what `top_k`, `top_p` and `min_p` leave out; the most probable token always stays.

    logits: [B, V], already divided by the temperature. Returns [B, V]. Temperature itself is not looked at.
    """
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if sampling.top_p < 1.0:
        logits = logits.masked_fill(logits < _least_of_nucleus(logits, sampling.top_p), -torch.inf)
    if sampling.min_p > 0.0:
        bar = logits.amax(dim=-1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < bar, -torch.inf)
    return logits


def _least_of_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The least logit, [B, 1], of the smallest set of most probable tokens whose mass reaches `top_p`.

    Mostly a few hundred tokens hold it; more are looked at, in the end all, where they do not: a sort of the whole
    vocabulary takes a CPU longer than a small model's step.
    """
    size, looked_at = logits.shape[-1], _NUCLEUS_AT_FIRST
    whole = logits.logsumexp(dim=-1, keepdim=True)
    while True:
        best = logits.topk(min(looked_at, size), dim=-1).values
        mass = (best - whole).exp()
        reached = mass.cumsum(dim=-1)
        if looked_at >= size or bool((reached[:, -1] >= top_p).all()):
            last = (reached - mass < top_p).sum(dim=-1, keepdim=True) - 1
            return best.gather(-1, last.clamp(min=0))
        looked_at *= 16


def sample(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """One token a row by the inverse of the cumulative distribution, in fp32.

    logits: [B, V] of any dtype. uniform: [B] in [0, 1), one number a row (not looked at when greedy).
    Returns [B] ids: the first id at which the cumulative mass of the filtered distribution exceeds `uniform`.
    """
    logits = logits.float()
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    probability = filter_logits(logits / sampling.temperature, sampling).softmax(dim=-1)
    cumulative = probability.cumsum(dim=-1)
    level = uniform.to(cumulative).unsqueeze(-1) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, level, right=True).clamp(max=logits.shape[-1] - 1)
    # A level that rounding put past the last token or on one that was filtered out belongs to no token, nor
    # do logits that are not numbers; an id that exists is returned all the same.
    possible = probability.gather(-1, chosen) > 0
    return torch.where(possible, chosen, probability.argmax(dim=-1, keepdim=True)).squeeze(-1)


def mixed_logits(logits: Tensor, partner_logits: Tensor, share: float) -> Tensor:
    """log((1 - share) * softmax(logits) + share * softmax(partner_logits)), [B, V] in fp32; share in (0, 1)."""
    own = logits.float().log_softmax(dim=-1) + math.log1p(-share)
    return torch.logaddexp(own, partner_logits.to(own).log_softmax(dim=-1) + math.log(share))
