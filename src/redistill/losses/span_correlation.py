"""Span level: the student's neighbouring tokens of a phrase should go together as the teacher's do.

c_p = p_j * p_{j+1} (element-wise over the vocabulary) for adjacent positions inside a span, c_q likewise
(Liu et al., arXiv 2407.10068, correlation consistency); the loss compares the two vectors.
"""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from redistill.losses.divergences import check_logits

Distance = Literal["norm", "squared", "cosine"]

_TINY = torch.finfo(torch.float32).tiny


def span_correlation(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    span_ids: Int[Tensor, " N"],
    *,
    distance: Distance = "norm",
) -> Float[Tensor, " S"]:
    """For each span, the mean over its adjacent pairs of the distance between c_p and c_q; 0 where p = q.

    `span_ids`: -1 outside; a run of one number is one span, so number the spans through the whole batch (two
    sequences that meet with the same number would be one run). A run of a single token has no pair: it is not
    a span and has no entry in the result. S = 0 gives an empty tensor whose sum is 0 and keeps the graph.
    `distance`: "norm" ||c_p - c_q||_2 (0 to sqrt 2), "squared" its square, "cosine" 1 - cos (0 to 1).
    fp32; the teacher is detached; the gradient is finite everywhere, 0 at p = q. No unit: the probabilities'
    products. ValueError on shapes that do not fit and unknown distances.
    """
    check_logits(student_logits, teacher_logits)
    if span_ids.shape != student_logits.shape[:1]:
        raise ValueError(
            f"span_ids must have one number per row of student_logits ([{len(student_logits)}]), "
            f"but has shape {list(span_ids.shape)}."
        )
    if distance not in get_args(Distance):
        raise ValueError(f"distance must be one of {', '.join(get_args(Distance))}, not {distance!r}.")
    rows, linked, span, sizes = _pairs(span_ids)
    if not len(rows):
        return student_logits[:0].float().sum(-1)
    p = torch.softmax(teacher_logits.detach()[rows].float(), dim=-1)
    q = torch.softmax(student_logits[rows].float(), dim=-1)
    # Of neighbouring rows only the last of a span and the first of the next make no pair: cheaper to compute
    # those few products too than to copy [pairs, V] out of p and q.
    gaps = _distance(p[:-1] * p[1:], q[:-1] * q[1:], distance)
    return gaps.new_zeros(len(sizes)).index_add(0, span, gaps[linked]) / sizes


class SpanTerms(NamedTuple):
    """`gaps` [S], as `span_correlation` gives them, and the gradient of their sum for log q (as if its classes were
    free): `by_pair` [R, V] belongs to the rows `first` and `first + 1` of each pair alike, `first` [R]."""

    gaps: Float[Tensor, " S"]
    first: Int[Tensor, " R"]
    by_pair: Float[Tensor, "R V"]


@torch.no_grad()
def span_terms(
    p: Float[Tensor, "N V"],
    q: Float[Tensor, "N V"],
    span_ids: Int[Tensor, " N"],
    distance: Distance = "norm",
) -> SpanTerms:
    """`span_correlation` of probabilities, with its gradient in closed form: dc_q/dlog q is c_q, for both rows of a
    pair."""
    rows, linked, span, sizes = _pairs(span_ids)
    first = rows[:-1][linked]
    second = first + 1
    c_p, c_q = p[first].mul_(p[second]), q[first].mul_(q[second])
    if distance == "cosine":
        with torch.enable_grad():
            leaf = c_q.requires_grad_()
            gap = _distance(c_p, leaf, distance)
            (by_c,) = torch.autograd.grad(gap.sum(), leaf)
        c_q = c_q.detach()
    else:
        by_c = torch.sub(c_q, c_p, out=c_p)
        gap = torch.linalg.vector_norm(by_c, dim=-1)
        # Twice the gap for the squared distance; a unit vector for the norm, 0 where the gap is.
        scale = (
            2.0
            if distance == "squared"
            else torch.where(gap > 0, gap.clamp(min=_TINY).reciprocal(), 0.0)[:, None]
        )
        by_c.mul_(scale)
        gap = gap.square() if distance == "squared" else gap
    share = sizes.reciprocal()[span]
    gaps = gap.new_zeros(len(sizes)).index_add(0, span, gap.detach() * share)
    return SpanTerms(gaps, first, by_c.mul_(c_q).mul_(share[:, None]))


def _pairs(span_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows that are in a pair; which of them (but the last) has its neighbour there; of those, the number of the
    span; and of each span, how many pairs it has (fp32)."""
    pair = (span_ids[1:] == span_ids[:-1]) & (span_ids[1:] >= 0)
    inside = torch.zeros_like(span_ids, dtype=torch.bool)
    inside[1:] |= pair
    inside[:-1] |= pair
    rows = inside.nonzero()[:, 0]
    linked = pair[rows[:-1]]
    span = (~linked).cumsum(0)[linked]
    return rows, linked, span, torch.bincount(span).float()


def _distance(c_p: Tensor, c_q: Tensor, distance: Distance) -> Tensor:
    if distance == "norm":
        # vector_norm's gradient at 0 is 0.
        return torch.linalg.vector_norm(c_p - c_q, dim=-1)
    if distance == "squared":
        return (c_p - c_q).square().sum(-1)
    # Half the squared distance of unit vectors is 1 - cos, and exactly 0 for equal ones.
    return 0.5 * (_unit(c_p) - _unit(c_q)).square().sum(-1)


def _unit(c: Tensor) -> Tensor:
    # The squares of products of probabilities underflow: scale first, by a constant that cancels. The bounds
    # keep the gradient finite where two neighbours have no class in common and c is 0.
    scaled = c / c.detach().amax(-1, keepdim=True).clamp(min=1e-20)
    return scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).clamp(min=1e-6)
