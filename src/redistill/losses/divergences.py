"""Divergences between teacher `p` and student `q`, per position, in nats.

Each takes `[N, V]` student logits and `[N, V]` teacher logits and returns `[N]`; mask, shift, temperature and
reduction live elsewhere. All of them: computed in fp32 whatever comes in; at least 0, and 0 where p = q; the
teacher is detached; logits of -inf are allowed (see `log_probabilities`). ValueError on wrong shapes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from redistill.losses.quantile import find_blocks

Logits = Float[Tensor, "N V"]
PerToken = Float[Tensor, " N"]

# The log-probability of an impossible class (logit -inf). Far below what real logits give, and finite, so that
# 0 * log(0) is 0 and no gradient is NaN. What would be infinite (a class that one of the two bars and the other does
# not) costs 1e5 nats times its probability; a class that the student bars is a constant, without gradient.
LOG_FLOOR = -1e5


def check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """ValueError unless both are floating-point `[N, V]` of one shape."""
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if logits.dim() != 2 or not logits.is_floating_point():
            raise ValueError(
                f"{name} must be floating-point [N, V] (one row per position), but is {logits.dtype} of "
                f"shape {list(logits.shape)}: select the response positions first, e.g. logits[mask]."
            )
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits {list(student_logits.shape)} and teacher_logits {list(teacher_logits.shape)} "
            "must have one shape: the same positions and vocabulary (trim padded rows of the output layer)."
        )


def log_probabilities(logits: Logits) -> Logits:
    """fp32 log-softmax over V, bounded below by `LOG_FLOOR`."""
    return F.log_softmax(logits.float(), dim=-1).clamp(min=LOG_FLOOR)


class Distributions(NamedTuple):
    """Teacher p and student q at some positions, fp32 [N, V] each, without gradient."""

    log_p: Logits
    log_q: Logits
    p: Logits
    q: Logits


@torch.no_grad()
def distributions(student_logits: Logits, teacher_logits: Logits) -> Distributions:
    """Both, of checked logits."""
    check_logits(student_logits, teacher_logits)
    log_p, log_q = (
        F.log_softmax(logits.float(), dim=-1).clamp_(min=LOG_FLOOR)
        for logits in (teacher_logits, student_logits)
    )
    return Distributions(log_p, log_q, log_p.exp(), log_q.exp())


def to_logits(by_log_q: Tensor, log_q: Tensor, q: Tensor) -> Tensor:
    """The gradient of the logits for that of log q, in its place: what log-softmax and its floor hand back."""
    # To look first is the shorter way, but for a compiler, which has no branches and fuses the mask.
    if torch.compiler.is_compiling() or (log_q.numel() and log_q.amin() <= LOG_FLOOR):
        by_log_q.masked_fill_(log_q <= LOG_FLOOR, 0.0)
    return by_log_q.addcmul_(q, by_log_q.sum(-1, keepdim=True), value=-1)


def forward_kl(student_logits: Logits, teacher_logits: Logits) -> PerToken:
    """KL(p || q) = sum p log(p / q), the loss of plain distillation (Hinton et al. 2015)."""
    log_p, log_q = _both(student_logits, teacher_logits)
    return _kl(log_p, log_q)


def reverse_kl(student_logits: Logits, teacher_logits: Logits) -> PerToken:
    """KL(q || p) = sum q log(q / p) over the whole vocabulary (the divergence of MiniLLM, Gu et al. 2024)."""
    log_p, log_q = _both(student_logits, teacher_logits)
    return _kl(log_q, log_p)


def jensen_shannon(student_logits: Logits, teacher_logits: Logits, beta: float = 0.5) -> PerToken:
    """Generalised Jensen-Shannon, beta KL(p || M) + (1 - beta) KL(q || M), M = (1 - beta) q + beta p.

    GKD, Agarwal et al. 2024, Eq. 1, with TRL's convention for the ends, where the formula itself would be 0:
    beta 0 is forward KL, beta 1 is reverse KL. For 0 < beta < 1 at most the entropy of (beta, 1 - beta).
    DistiLLM's lambda is 1 - beta.
    """
    _check_share("beta", beta, upper_allowed=True)
    log_p, log_q = _both(student_logits, teacher_logits)
    if beta == 0:
        return _kl(log_p, log_q)
    if beta == 1:
        return _kl(log_q, log_p)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def skewed_forward_kl(student_logits: Logits, teacher_logits: Logits, alpha: float = 0.1) -> PerToken:
    """KL(p || alpha p + (1 - alpha) q): DistiLLM, Ko et al. 2024, with its default alpha.

    At most -log(alpha); alpha 0 is forward KL.
    """
    _check_share("alpha", alpha, upper_allowed=False)
    log_p, log_q = _both(student_logits, teacher_logits)
    return _kl(log_p, _log_mixture(log_p, log_q, alpha))


def skewed_reverse_kl(student_logits: Logits, teacher_logits: Logits, alpha: float = 0.1) -> PerToken:
    """KL(q || alpha q + (1 - alpha) p): DistiLLM, Ko et al. 2024, with its default alpha.

    At most -log(alpha); alpha 0 is reverse KL.
    """
    _check_share("alpha", alpha, upper_allowed=False)
    log_p, log_q = _both(student_logits, teacher_logits)
    return _kl(log_q, _log_mixture(log_q, log_p, alpha))


def adaptive_kl(student_logits: Logits, teacher_logits: Logits, mu: float = 0.5) -> PerToken:
    """AKL, Wu et al. 2024 ("Rethinking Kullback-Leibler Divergence..."): w KL(p || q) + (1 - w) KL(q || p).

    The head is the smallest set of the teacher's most probable classes that holds at least mass `mu`
    (classes of equal probability go together), the tail is the rest; w = the head's share of sum |p - q|,
    detached. Where the two agree everywhere w is 1/2. The class that reaches `mu` is of the head, as in
    DSKD's and ToDi's code; the script that Wu et al. released leaves it to the tail, unless it is the first.
    """
    if not 0 < mu < 1:
        raise ValueError(
            f"mu must lie between 0 and 1 (the teacher mass of the head; 0.5 in the paper), not {mu}."
        )
    log_p, log_q = _both(student_logits, teacher_logits)
    with torch.no_grad():
        p = log_p.exp()
        gap = (p - log_q.exp()).abs()
        (edge,) = find_blocks(p, (p.new_full((len(p),), 1 - mu),), "mass")
        head = (gap * (p >= edge.value[:, None])).sum(-1)
        whole = gap.sum(-1)
        weight = torch.where(whole > 0, head / whole, 0.5)
    return weight * _kl(log_p, log_q) + (1 - weight) * _kl(log_q, log_p)


def total_variation(student_logits: Logits, teacher_logits: Logits) -> PerToken:
    """1/2 sum |p - q|, between 0 and 1 (f-distill, Wen et al. 2023)."""
    log_p, log_q = _both(student_logits, teacher_logits)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def todi(student_logits: Logits, teacher_logits: Logits, beta: float = 1.0) -> PerToken:
    """ToDi, Jung et al. 2025 (arXiv 2505.16297): sum w p log(p / q) + (1 - w) q log(q / p), w per class.

    w = sigmoid(beta log(p / q)), detached: forward KL where the student is too low, reverse KL where it is too
    high. At beta 1, which is their code, w = p / (p + q), and the value (not the gradient) is that of forward
    plus reverse KL; beta 0 is half of both. ValueError for a negative beta, which would reward disagreement.
    """
    _check_power("beta", beta)
    log_p, log_q = _both(student_logits, teacher_logits)
    gap = log_p - log_q
    weight = torch.sigmoid(beta * gap.detach())
    return (gap * (weight * log_p.exp() - (1 - weight) * log_q.exp())).sum(-1)


def alpha_beta(
    student_logits: Logits, teacher_logits: Logits, alpha: float = 0.2, beta: float = 0.7
) -> PerToken:
    """ABKD, Wang et al. 2025 (arXiv 2505.04560), with s = alpha + beta:
    sum (alpha / s p^s + beta / s q^s - p^alpha q^beta) / (alpha beta).

    (1, 0) is forward KL, (0, 1) reverse KL, (0, 0) half of sum log(p / q)^2, all three as limits; the defaults are
    those of their GPT-2 runs on Dolly. With both positive it stays finite for any p and q: at most
    1 / (alpha beta) for s >= 1, V^(1 - s) times that below. ValueError for a negative alpha or beta: a class that
    one of the two bars would cost infinitely much.
    """
    _check_power("alpha", alpha)
    _check_power("beta", beta)
    log_p, log_q = _both(student_logits, teacher_logits)
    gap, power = (log_p - log_q).abs(), alpha + beta
    if power == 0:
        return 0.5 * gap.square().sum(-1)
    # The larger of p and q is taken out of each class, and alpha beta divided away: then nothing overflows,
    # log-probabilities far below what fp32 probabilities can hold still count, and alpha or beta may be 0.
    rise_alpha, rise_beta = _rise(alpha, gap), _rise(beta, gap)
    too_low = rise_beta - rise_alpha * (-beta * gap).exp()
    too_high = rise_alpha - rise_beta * (-alpha * gap).exp()
    scale = (power * torch.maximum(log_p, log_q)).exp() / power
    return (scale * torch.where(log_q < log_p, too_low, too_high)).sum(-1)


def cross_entropy(student_logits: Logits, targets: Int[Tensor, " N"]) -> PerToken:
    """-log q(target), for fine-tuning on a reference. `targets`: class ids; masked positions are left out."""
    if student_logits.dim() != 2 or targets.shape != student_logits.shape[:1]:
        raise ValueError(
            f"cross_entropy needs student_logits [N, V] and targets [N], but got "
            f"{list(student_logits.shape)} and {list(targets.shape)}: select the response positions first."
        )
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < student_logits.shape[1]:
        raise ValueError(
            f"targets must lie in 0..{student_logits.shape[1] - 1}, but reach from {int(targets.min())} to "
            f"{int(targets.max())}: leave masked positions (-100) out of student_logits and targets."
        )
    return F.cross_entropy(student_logits.float(), targets, reduction="none")


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "total_variation": total_variation,
    "todi": todi,
    "alpha_beta": alpha_beta,
}


def _both(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    check_logits(student_logits, teacher_logits)
    return log_probabilities(teacher_logits.detach()), log_probabilities(student_logits)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, share_a: float) -> Tensor:
    """log(share_a * a + (1 - share_a) * b)."""
    if share_a == 0:
        return log_b
    return torch.logaddexp(log_a + math.log(share_a), log_b + math.log1p(-share_a))


def _rise(power: float, gap: Tensor) -> Tensor:
    """(1 - exp(-power gap)) / power, which is `gap` for power 0."""
    return torch.expm1(-power * gap) / -power if power else gap


def _check_power(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, not {value}.")


def _check_share(name: str, value: float, *, upper_allowed: bool) -> None:
    if not 0 <= value <= 1 or (value == 1 and not upper_allowed):
        end = "0 to 1" if upper_allowed else "0 to less than 1"
        raise ValueError(f"{name} must be a share from {end}, not {value}.")
