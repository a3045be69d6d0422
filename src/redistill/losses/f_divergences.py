"""f-divergences class by class: what a channel over the classes (DAC-KL's clip) can be put in front of.

An f-divergence is `D(p, q) = sum_k g(p_k, q_k)` with `g(t a, t b) = t g(a, b)`. So a class of which the share m
goes on as itself costs `m g(p, q)`, and what several classes lose together, as one outcome, costs `g` of the two
sums; the result is between 0 and `D(p, q)` (Csiszar 1967: no channel can raise an f-divergence).
"""

from collections.abc import Callable

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny

# (log p, log q, p, q), all of one shape -> (g, q dg/dq), of that shape. By Euler's rule p dg/dp is g - q dg/dq.
FDivergence = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_kl_parts(log_p: Tensor, log_q: Tensor, p: Tensor, _q: Tensor) -> tuple[Tensor, Tensor]:
    """g = p log(p / q)."""
    return p * (log_p - log_q), -p


def reverse_kl_parts(log_p: Tensor, log_q: Tensor, _p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """g = q log(q / p)."""
    g = q * (log_q - log_p)
    return g, g + q


def jensen_shannon_parts(beta: float) -> FDivergence:
    """g = beta p log(p / M) + (1 - beta) q log(q / M), M = beta p + (1 - beta) q; 0 and 1 as in TRL."""
    if beta in (0, 1):
        return reverse_kl_parts if beta else forward_kl_parts

    def parts(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        log_m = _log_mixture(p, q, beta)
        by_q = (1 - beta) * q * (log_q - log_m)
        return beta * p * (log_p - log_m) + by_q, by_q

    return parts


def skewed_forward_kl_parts(alpha: float) -> FDivergence:
    """g = p log(p / M), M = alpha p + (1 - alpha) q."""
    if alpha == 0:
        return forward_kl_parts

    def parts(log_p: Tensor, _log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        log_ratio = log_p - _log_mixture(p, q, alpha)
        # (1 - alpha) q / M is 1 - alpha p / M.
        return p * log_ratio, p * (alpha * log_ratio.exp() - 1)

    return parts


def skewed_reverse_kl_parts(alpha: float) -> FDivergence:
    """g = q log(q / M), M = alpha q + (1 - alpha) p."""
    if alpha == 0:
        return reverse_kl_parts

    def parts(_log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        log_ratio = log_q - _log_mixture(q, p, alpha)
        g = q * log_ratio
        return g, g + q * (1 - alpha * log_ratio.exp())

    return parts


def total_variation_parts(_log_p: Tensor, _log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """g = |p - q| / 2."""
    return 0.5 * (p - q).abs(), 0.5 * q * (q - p).sign()


def _log_mixture(a: Tensor, b: Tensor, share_a: float) -> Tensor:
    """log(share_a a + (1 - share_a) b), of classes that fp32 holds; below that what they cost is nothing anyway."""
    return torch.lerp(b, a, share_a).clamp_(min=_TINY).log_()


def f_divergence(name: str, alpha: float = 0.1, beta: float = 0.5) -> FDivergence | None:
    """The divergence of that name, class by class, with its setting bound; None for one that is no f-divergence."""
    table: dict[str, Callable[[], FDivergence]] = {
        "forward_kl": lambda: forward_kl_parts,
        "reverse_kl": lambda: reverse_kl_parts,
        "jensen_shannon": lambda: jensen_shannon_parts(beta),
        "skewed_forward_kl": lambda: skewed_forward_kl_parts(alpha),
        "skewed_reverse_kl": lambda: skewed_reverse_kl_parts(alpha),
        "total_variation": lambda: total_variation_parts,
    }
    return table[name]() if name in table else None
