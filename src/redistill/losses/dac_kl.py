"""DAC-KL: a divergence on the part of the teacher's distribution that a small network chooses to keep.

Liu et al., arXiv 2407.10068 (distribution adaptive clipping). The classes lie on the axis [0, 1] from the
least to the most probable for the teacher; m_k is the share of class k's interval inside [lower, upper], and
always 1 for the teacher's argmax. The divergence is forward KL as in the paper, or any other of
f_divergences.py. What the paper leaves open and we chose is in docs/paper.md. The network that chooses the
levels is in clip_network.py.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redistill.losses.divergences import Distributions, check_logits, distributions, to_logits
from redistill.losses.f_divergences import FDivergence, forward_kl_parts
from redistill.losses.quantile import Quantile, class_sizes, find_blocks, first_largest

Rest = Literal["bucket", "drop", "renormalize"]
Edge = Literal["exact", "sigmoid"]
Logits = Float[Tensor, "N V"]
PerToken = Float[Tensor, " N"]
Levels = tuple[PerToken, PerToken]

_TINY = torch.finfo(torch.float32).tiny
_LEAST = 1e-30  # a kept mass that one may divide by: smaller is nothing kept


class DacTerms(NamedTuple):
    """`divergence` [N] in nats; `retained_mass` [N] = sum m p (differentiable in the levels, for the coverage
    term); `retained_classes` [N] = sum m (for the log, no gradient)."""

    divergence: PerToken
    retained_mass: PerToken
    retained_classes: PerToken


class Clip(NamedTuple):
    """`m` [N, V] without gradient; `row` and `column` of its E entries that move with the levels, and `moving` [E],
    which carries their gradient."""

    m: Logits
    row: Int[Tensor, " E"]
    column: Int[Tensor, " E"]
    moving: Float[Tensor, " E"]


class Clipped(NamedTuple):
    """`divergence`, `mass` = sum m p [N]; `by_log_q` [N, V] and `by_moving` [E]: the divergence's gradients for log q
    (as if its classes were free) and for the entries that move; `mass_by_moving` [E]: the mass's."""

    divergence: PerToken
    mass: PerToken
    by_log_q: Logits
    by_moving: Float[Tensor, " E"]
    mass_by_moving: Float[Tensor, " E"]


class Classes(NamedTuple):
    """`divergence`, `mass` [N] and `by_log_q` [N, V] as in `Clipped`; of an entry that moves the slope is
    g - p along_p - q along_q, with `g` [N, V] and the others [N], and 0 where the row does not `moves`."""

    divergence: PerToken
    mass: PerToken
    by_log_q: Logits
    g: Logits
    along_p: PerToken
    along_q: PerToken
    moves: Bool[Tensor, " N"]


def dac_kl(
    student_logits: Logits,
    teacher_logits: Logits,
    lower: PerToken,
    upper: PerToken,
    *,
    quantile: Quantile = "mass",
    rest: Rest = "bucket",
    edge: Edge = "exact",
    keep_target: bool = True,
    sharpness: float = 4.0,
    parts: FDivergence = forward_kl_parts,
) -> PerToken:
    """The clipped divergence of each position, in nats. Computed in fp32; the teacher is detached.

    `lower`, `upper`: [N], 0 <= lower <= upper <= 1; 0 and 1 are wide open, which is D. Both may
    carry a gradient: m's slope is -1 / w and +1 / w, w the length of the block of classes at the edge (classes
    of equal probability share their block equally), and 0 where a level is exactly 0 or 1.
    `quantile`: "mass": class k is w_k = p_k long, so upper - lower is the teacher mass kept; "rank": 1 / V.
    `parts`: the divergence D = sum g(p, q), class by class (f_divergences.py); forward KL has g = p log(p / q).
    `rest`, what becomes of the clipped classes, with R_p = sum (1 - m) p and R_q = sum (1 - m) q:
    "bucket": sum m g(p, q) + g(R_p, R_q), a true divergence, between 0 and D, 0 at p = q;
    "drop": the first term alone (the paper's Eq. 7-8 as we read them; can be negative, 0 at p = q);
    "renormalize": D of m p and m q, each divided by its sum (at least 0; 0 at p = q).
    Nothing is infinite: a bucket of less mass than fp32 can hold counts as 1e-38, kept mass below 1e-30 as 1e-30, and
    classes whose probability fp32 cannot hold are one block, in the middle of which "rank" may cut.
    `edge`: "exact", or "sigmoid": m = s(log p - log t_lower) s(log t_upper - log p), s the sigmoid with slope
    `sharpness` per nat and t the probability at a level (interpolated; sorts the vocabulary; an ablation).
    `keep_target`: m = 1 for the teacher's argmax (the first one of equals).
    ValueError on shapes that do not match, levels out of order or range, and unknown options.
    """
    return dac_terms(
        student_logits,
        teacher_logits,
        lower,
        upper,
        quantile=quantile,
        rest=rest,
        edge=edge,
        keep_target=keep_target,
        sharpness=sharpness,
        parts=parts,
    ).divergence


def dac_terms(
    student_logits: Logits,
    teacher_logits: Logits,
    lower: PerToken,
    upper: PerToken,
    *,
    quantile: Quantile = "mass",
    rest: Rest = "bucket",
    edge: Edge = "exact",
    keep_target: bool = True,
    sharpness: float = 4.0,
    parts: FDivergence = forward_kl_parts,
) -> DacTerms:
    """`dac_kl` with what it kept; arguments as there."""
    check_logits(student_logits, teacher_logits)
    _check_levels(lower, upper, len(student_logits))
    options = (("quantile", quantile, Quantile), ("rest", rest, Rest), ("edge", edge, Edge))
    for name, value, allowed in options:
        if value not in get_args(allowed):
            raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, not {value!r}.")
    if not sharpness > 0:
        raise ValueError(f"sharpness must be positive (slope per nat of the sigmoid edge), not {sharpness}.")
    both = distributions(student_logits.detach(), teacher_logits.detach())
    clip = clip_of(both, (lower, upper), quantile, edge, keep_target, sharpness)
    divergence, mass = _ClippedDivergence.apply(student_logits, clip.moving, both, clip, rest, parts)
    return DacTerms(divergence, mass, clip.m.sum(-1))


def clip_of(
    both: Distributions,
    levels: Levels,
    quantile: Quantile = "mass",
    edge: Edge = "exact",
    keep_target: bool = True,
    sharpness: float = 4.0,
    tail: int | None = None,
) -> Clip:
    """m for checked levels (lower, upper); tail: see `find_blocks`; the rest as in `dac_kl`."""
    if edge == "exact":
        return _exact_clip(both.p, levels, quantile, keep_target, tail)
    return _sigmoid_clip(both.log_p, levels, quantile, keep_target, sharpness, tail)


def _check_levels(lower: Tensor, upper: Tensor, n: int) -> None:
    for name, level in (("lower", lower), ("upper", upper)):
        if level.shape != (n,) or not level.is_floating_point():
            raise ValueError(
                f"{name} must be a floating-point tensor with one level per row ([{n}]), "
                f"but is {level.dtype} of shape {list(level.shape)}."
            )
    if ((lower < 0) | (upper > 1) | (lower > upper)).any():
        raise ValueError(
            "The quantile levels must satisfy 0 <= lower <= upper <= 1 in every row (0 and 1 = wide open)."
        )


def _exact_clip(p: Tensor, levels: Levels, quantile: Quantile, keep_target: bool, tail: int | None) -> Clip:
    """What moves are the classes at the two edges."""
    low, high = find_blocks(p, levels, quantile, tail)
    p = p if tail is None else p / class_sizes(p, tail).clamp(min=1)
    m = ((p >= low.value[:, None]) & (p <= high.value[:, None])).float()
    row, column = torch.cat((low.row, high.row)), torch.cat((low.column, high.column))
    # Both edges can cut one and the same block: each takes its own part away from 1.
    cut = torch.cat((low.share[low.row], 1 - high.share[high.row]))
    if keep_target:
        target = first_largest(p)
        m.scatter_(1, target[:, None], 1.0)
        cut = torch.where(column == target[row], 0.0, cut)
    flat = row * p.shape[1] + column
    m.view(-1).index_add_(0, flat, -cut.detach())
    # An entry cut from both sides is listed twice, so of the last one only the slope means anything.
    return Clip(m.clamp_(0, 1), row, column, -cut)


def _sigmoid_clip(
    log_p: Tensor, levels: Levels, quantile: Quantile, keep_target: bool, sharpness: float, tail: int | None
) -> Clip:
    """Every entry moves."""
    sizes = class_sizes(log_p, tail)
    log_p = log_p - sizes.clamp(min=1).log()
    ascending, order = log_p.sort(-1)
    sizes = sizes.expand_as(order).gather(1, order)
    width = sizes * (ascending.exp() if quantile == "mass" else 1 / sizes.sum(-1, keepdim=True))
    end = width.cumsum(-1)
    logs = ascending.clamp(min=math.log(_TINY))

    def log_threshold(level: Tensor) -> Tensor:
        """log p at a level: a class's own at the end of its interval, straight lines in between."""
        right = torch.searchsorted(end, level.detach()[:, None]).clamp(max=log_p.shape[1] - 1)
        left = (right - 1).clamp(min=0)
        span = width.gather(1, right).clamp(min=_TINY)
        part = ((level[:, None] - (end.gather(1, right) - span)) / span).clamp(0, 1)
        return torch.lerp(logs.gather(1, left), logs.gather(1, right), part)

    lower, upper = (log_threshold(level.float()) for level in levels)
    m = torch.sigmoid(sharpness * (log_p - lower)) * torch.sigmoid(sharpness * (upper - log_p))
    if keep_target:
        m = m.scatter(1, log_p.argmax(-1, keepdim=True), 1.0)
    row, column = torch.ones_like(m, dtype=torch.bool).nonzero(as_tuple=True)
    return Clip(m.detach(), row, column, m.reshape(-1))


@torch.no_grad()
def clipped_classes(both: Distributions, m: Logits, rest: Rest, parts: FDivergence) -> Classes:
    """The clipped divergence with its gradients in closed form, as far as it is elementwise and sums.

    Of each class only q dg/dq is needed, and of the bucket as of one class more.
    """
    log_p, log_q, p, q = both
    mass = (m * p).sum(-1, keepdim=True)
    kept, safe_p = mass > _LEAST, mass.clamp(min=_LEAST)
    safe_q = (m * q).sum(-1, keepdim=True).clamp_(min=_LEAST) if rest == "renormalize" else mass
    if rest == "renormalize":
        # Nothing kept (possible without the target class): 0, and no gradient.
        log_p, log_q = log_p - safe_p.log(), log_q - safe_q.log()
        p, q = (torch.where(kept, part, 0.0) for part in (p / safe_p, q / safe_q))
    g, by_q = parts(log_p, log_q, p, q)
    scratch = g * m
    value, by_q = scratch.sum(-1, keepdim=True), by_q.mul_(m)
    along_p = along_q = torch.zeros_like(mass)
    moves = torch.ones_like(mass, dtype=torch.bool)
    if rest == "renormalize":
        total = by_q.sum(-1, keepdim=True)
        by_q.sub_(torch.mul(q, m, out=scratch).mul_(total))
        along_p, along_q = (torch.where(kept, x, 0.0) for x in ((value - total) / safe_p, total / safe_q))
    elif rest == "bucket":
        # Sums of what is clipped, not 1 - sum of what is kept: that would lose small buckets to rounding.
        left_out = torch.sub(1, m, out=scratch)
        bucket_p = (left_out * p).sum(-1, keepdim=True)
        bucket_q = left_out.mul_(q).sum(-1, keepdim=True)
        safe_p, safe_q = bucket_p.clamp(min=_TINY), bucket_q.clamp(min=_TINY)
        bucket_g, bucket_by_q = parts(safe_p.log(), safe_q.log(), bucket_p, bucket_q)
        value = value + bucket_g
        along_p, along_q = (bucket_g - bucket_by_q) / safe_p, bucket_by_q / safe_q
        by_q.addcmul_(left_out, along_q)
        # An empty bucket takes in the edge's own classes first: there both slopes cancel.
        moves = bucket_p > 0
    return Classes(value[:, 0], mass[:, 0], by_q, g, along_p[:, 0], along_q[:, 0], moves[:, 0])


def clipped(both: Distributions, clip: Clip, classes: Classes) -> Clipped:
    """What `clipped_classes` found, with the gradients of the entries that move."""
    row, column = clip.row, clip.column
    edge_p, edge_q = both.p[row, column], both.q[row, column]
    by_moving = classes.g[row, column] - edge_p * classes.along_p[row] - edge_q * classes.along_q[row]
    by_moving = torch.where(classes.moves[row], by_moving, 0.0)
    return Clipped(classes.divergence, classes.mass, classes.by_log_q, by_moving, edge_p)


class _ClippedDivergence(torch.autograd.Function):
    """`clipped` for autograd, so that one [N, V] tensor is kept, not ten. Nothing flows to the teacher."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        _moving: Tensor,
        both: Distributions,
        clip: Clip,
        rest: Rest,
        parts: FDivergence,
    ) -> tuple[Tensor, Tensor]:
        found = clipped(both, clip, clipped_classes(both, clip.m, rest, parts))
        by_logits = to_logits(found.by_log_q, both.log_q, both.q)
        ctx.save_for_backward(by_logits, found.by_moving, found.mass_by_moving, clip.row)
        ctx.dtype = student_logits.dtype
        return found.divergence, found.mass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise ValueError("dac_kl has no second derivative: call backward without create_graph=True.")
        grad_value, grad_mass = grad_outputs
        by_logits, by_moving, mass_by_moving, row = ctx.saved_tensors
        to_student = to_moving = None
        if ctx.needs_input_grad[0]:
            to_student = (by_logits * grad_value[:, None]).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            to_moving = by_moving * grad_value[row] + mass_by_moving * grad_mass[row]
        return to_student, to_moving, None, None, None, None
