"""A vocabulary seen through the teacher's k most probable ids: k classes, and one more for all else, the tail.

Both distributions go through one channel, "a kept id to itself, every other to the tail". So what compares `[N, V]`
rows compares these of `[N, k + 1]` too: 0 where they are equal, and for an f-divergence never more than the dense
value (Csiszar 1967: no channel raises one), which it is for k >= V.

A row may tell fewer ids apart: V among its ids stands for none, a class of probability 0 for both.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redistill.losses.divergences import LOG_FLOOR


class Folded(NamedTuple):
    """`logs` [N, k + 1], the tail last; `share` [N, V + 1]: of a class in the tail, 0 for those that are kept."""

    logs: Float[Tensor, "N C"]
    share: Float[Tensor, "N W"]


def fold(logits: Float[Tensor, "N V"], ids: Int[Tensor, "N k"]) -> Float[Tensor, "N C"]:
    """Logits (or log-probabilities) of the k + 1 classes that `ids`, different ones in a row, make of V.

    The tail's is the log-sum-exp of what is not kept, at least `LOG_FLOOR`: exact for tails of any size, as nothing
    is taken from 1. Differentiable; normalised if `logits` are.
    """
    room = with_room(logits)
    rest = room.scatter(1, ids, -torch.inf)
    # Where nothing is left, log-sum-exp has no gradient that is a number.
    left = rest.amax(-1, keepdim=True) > LOG_FLOOR
    tail = torch.where(left, torch.where(left, rest, 0.0).logsumexp(-1, keepdim=True), LOG_FLOOR)
    kept = room.gather(1, ids).masked_fill(ids == logits.shape[1], LOG_FLOOR)
    return torch.cat((kept, tail), dim=1)


def with_room(logits: Float[Tensor, "N V"], value: float = -torch.inf) -> Float[Tensor, "N W"]:
    """A column more, for the id that stands for none."""
    return torch.nn.functional.pad(logits, (0, 1), value=value)


@torch.no_grad()
def fold_logs(log_q: Float[Tensor, "N V"], ids: Int[Tensor, "N k"]) -> Folded:
    """`fold`, with what `unfold` needs."""
    room = with_room(log_q)
    kept = room.gather(1, ids).masked_fill_(ids == log_q.shape[1], LOG_FLOOR)
    rest = room.scatter_(1, ids, -torch.inf)
    tail = rest.logsumexp(-1, keepdim=True).clamp_(min=LOG_FLOOR)
    return Folded(torch.cat((kept, tail), dim=1), rest.sub_(tail).exp_())


def unfold(by_logs: Float[Tensor, "N C"], ids: Int[Tensor, "N k"], share: Tensor) -> Float[Tensor, "N V"]:
    """The gradient for log q, of that for the folded logs: the tail's goes to its classes by their share, in the
    place of which it stands."""
    return share.mul_(by_logs[:, -1:]).scatter_add_(1, ids, by_logs[:, :-1])[:, :-1]
