"""The losses once more: float64, one row after the other, sorted and looped over, as near to the formulas as can be.

Slow on purpose. Gradients come from autograd, so that nothing is shared with the closed forms under test.
"""

import torch
from torch import Tensor


def rows(function, student_logits: Tensor, teacher_logits: Tensor, *more: Tensor, **options) -> Tensor:
    """`function(q, p, *more_of_the_row)` on every row's probabilities, stacked to [N]."""
    q, p = student_logits.double().softmax(-1), teacher_logits.double().softmax(-1)
    return torch.stack([function(q[i], p[i], *(x[i] for x in more), **options) for i in range(len(q))])


def kl(a: Tensor, b: Tensor) -> Tensor:
    return sum((x * (x / y).log() for x, y in zip(a, b, strict=True) if x > 0), start=a.new_zeros(()))


def forward_kl(q: Tensor, p: Tensor) -> Tensor:
    return kl(p, q)


def reverse_kl(q: Tensor, p: Tensor) -> Tensor:
    return kl(q, p)


def jensen_shannon(q: Tensor, p: Tensor, beta: float = 0.5) -> Tensor:
    mixture = (1 - beta) * q + beta * p
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def skewed_forward_kl(q: Tensor, p: Tensor, alpha: float = 0.1) -> Tensor:
    return kl(p, alpha * p + (1 - alpha) * q)


def skewed_reverse_kl(q: Tensor, p: Tensor, alpha: float = 0.1) -> Tensor:
    return kl(q, alpha * q + (1 - alpha) * p)


def adaptive_kl(q: Tensor, p: Tensor, mu: float = 0.5) -> Tensor:
    head, tail, mass = 0.0, 0.0, 0.0
    for k in sorted(range(len(p)), key=lambda k: -p[k].item()):
        gap = abs(p[k] - q[k]).item()
        if mass < mu:
            head += gap
        else:
            tail += gap
        mass += p[k].item()
    weight = head / (head + tail)
    return weight * kl(p, q) + (1 - weight) * kl(q, p)


def total_variation(q: Tensor, p: Tensor) -> Tensor:
    return sum((abs(x - y) for x, y in zip(q, p, strict=True)), start=q.new_zeros(())) / 2


def todi(q: Tensor, p: Tensor, beta: float = 1.0) -> Tensor:
    total = q.new_zeros(())
    for y, x in zip(q, p, strict=True):
        weight = (x**beta / (x**beta + y**beta)).detach()
        total = total + weight * x * (x / y).log() + (1 - weight) * y * (y / x).log()
    return total


def alpha_beta(q: Tensor, p: Tensor, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    if alpha == 0 and beta == 0:
        return ((p / q).log() ** 2).sum() / 2
    if alpha == 0 or beta == 0:
        a, b, k = (p, q, alpha) if beta == 0 else (q, p, beta)
        terms, divisor = [x**k * (x**k / y**k).log() - x**k + y**k for x, y in zip(a, b, strict=True)], k**2
    else:
        s, divisor = alpha + beta, alpha * beta
        terms = [x**s * alpha / s + y**s * beta / s - x**alpha * y**beta for x, y in zip(p, q, strict=True)]
    return torch.stack(terms).sum() / divisor


def clip_mask(
    p: Tensor, lower: Tensor, upper: Tensor, quantile: str = "mass", keep_target: bool = True
) -> Tensor:
    """m of one row: walk from the least to the most probable block and cut each one's interval with the levels."""
    m: list[Tensor] = [p.new_ones(())] * len(p)
    blocks: dict[float, list[int]] = {}
    for k, value in enumerate(p.tolist()):
        blocks.setdefault(value, []).append(k)
    position, low, high = 0.0, float(lower), float(upper)
    for value, members in sorted(blocks.items()):
        length = sum(value if quantile == "mass" else 1 / len(p) for _ in members)
        if length == 0:
            share = p.new_tensor(float(low == 0))
        elif position + length <= low or position >= high:
            share = p.new_zeros(())
        elif low <= position and position + length <= high:
            share = p.new_ones(())
        else:
            start = lower.clamp(min=position) if low > 0 else position
            end = upper.clamp(max=position + length) if high < 1 else position + length
            share = (end - start) / length + p.new_zeros(())
        for k in members:
            m[k] = share
        position += length
    if keep_target:
        m[max(range(len(p)), key=p.tolist().__getitem__)] = p.new_ones(())
    return torch.stack(m)


def kl_class(p, q):
    return p * (p / q).log() if p > 0 else p * 0


# g(p, q) of one class; the divergence is its sum.
CLASS = {
    "forward_kl": kl_class,
    "reverse_kl": lambda p, q: kl_class(q, p),
    "jensen_shannon": lambda p, q, b=0.3: (
        b * kl_class(p, b * p + (1 - b) * q) + (1 - b) * kl_class(q, b * p + (1 - b) * q)
    ),
    "skewed_forward_kl": lambda p, q, a=0.1: kl_class(p, a * p + (1 - a) * q),
    "skewed_reverse_kl": lambda p, q, a=0.1: kl_class(q, a * q + (1 - a) * p),
    "total_variation": lambda p, q: (p - q).abs() / 2,
}


def masked(q: Tensor, p: Tensor, m: Tensor, rest: str = "bucket", name: str = "forward_kl") -> Tensor:
    g = CLASS[name]
    if rest == "renormalize":
        p, q = m * p / (m * p).sum(), m * q / (m * q).sum()
        return sum(g(p[k], q[k]) for k in range(len(p)) if m[k] > 0)
    first = sum((m[k] * g(p[k], q[k]) for k in range(len(p)) if m[k] > 0), start=q.new_zeros(()))
    left_p, left_q = ((1 - m) * p).sum(), ((1 - m) * q).sum()
    return first if rest == "drop" or left_p == left_q == 0 else first + g(left_p, left_q)


def dac_kl(
    q: Tensor,
    p: Tensor,
    lower: Tensor,
    upper: Tensor,
    *,
    rest: str = "bucket",
    name: str = "forward_kl",
    **mask,
) -> Tensor:
    return masked(q, p, clip_mask(p, lower, upper, **mask), rest, name)


def span_correlation(
    student_logits: Tensor, teacher_logits: Tensor, span_ids: list[int], distance="norm"
) -> Tensor:
    q, p = student_logits.double().softmax(-1), teacher_logits.double().softmax(-1)
    spans: list[list[int]] = []
    for position, number in enumerate(span_ids):
        if number >= 0 and position and span_ids[position - 1] == number:
            spans[-1].append(position)
        else:
            spans.append([position])
    means = []
    for span in spans:
        gaps = []
        for j in span[:-1]:
            a, b = p[j] * p[j + 1], q[j] * q[j + 1]
            square = ((a - b) ** 2).sum()
            cosine = 1 - (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()
            norm = square.sqrt() if square > 0 else square
            gaps.append({"norm": norm, "squared": square, "cosine": cosine}[distance])
        if gaps:
            means.append(sum(gaps) / len(gaps))
    return torch.stack(means)
