"""The whole objective once more: from hidden states and heads to one number, dense, in float64, by autograd.

On logarithms, so that it stays exact where probabilities underflow. Nothing is shared with what it is held against
but the weights of the clip network.
"""

import copy
import math

import naive
import torch
from torch import Tensor

# The floor that the public losses promise for the log-probability of a barred class.
FLOOR = -1e5


def log_probabilities(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1).clamp(min=FLOOR)


def kl_class(log_a: Tensor, log_b: Tensor) -> Tensor:
    return log_a.exp() * (log_a - log_b)


def mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def jensen_shannon(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = mixture(p, q, beta)
    return beta * kl_class(p, m) + (1 - beta) * kl_class(q, m)


def alpha_beta(p: Tensor, q: Tensor, alpha: float, beta: float) -> Tensor:
    s = alpha + beta
    powers = alpha / s * (s * p).exp() + beta / s * (s * q).exp() - (alpha * p + beta * q).exp()
    return powers / (alpha * beta)


def todi(p: Tensor, q: Tensor) -> Tensor:
    weight = torch.sigmoid(p - q).detach()
    return weight * kl_class(p, q) + (1 - weight) * kl_class(q, p)


def adaptive_kl(p: Tensor, q: Tensor) -> Tensor:
    order = p.argsort(-1, descending=True)
    before = p.exp().gather(1, order).cumsum(-1) - p.exp().gather(1, order)
    gap = (p.exp() - q.exp()).abs().detach()
    head = (gap.gather(1, order) * (before < 0.5)).sum(-1, keepdim=True)
    weight = torch.where(gap.sum(-1, keepdim=True) > 0, head / gap.sum(-1, keepdim=True), 0.5)
    return weight * kl_class(p, q) + (1 - weight) * kl_class(q, p)


def per_class(name: str, alpha: float, beta: float):
    """(log p, log q) -> what each class costs."""
    return {
        "forward_kl": kl_class,
        "reverse_kl": lambda p, q: kl_class(q, p),
        "jensen_shannon": lambda p, q: jensen_shannon(p, q, beta),
        "skewed_forward_kl": lambda p, q: kl_class(p, mixture(p, q, alpha)),
        "skewed_reverse_kl": lambda p, q: kl_class(q, mixture(q, p, alpha)),
        "total_variation": lambda p, q: (p.exp() - q.exp()).abs() / 2,
        "adaptive_kl": adaptive_kl,
        "todi": todi,
        "alpha_beta": lambda p, q: alpha_beta(p, q, alpha, beta),
    }[name]


def log_of(mass: Tensor) -> Tensor:
    return mass.clamp(min=math.exp(-700)).log()


def dac_kl(settings, log_p: Tensor, log_q: Tensor, levels: tuple[Tensor, Tensor]) -> Tensor:
    """With the coverage term's gradient, and not its value."""
    dac = settings.dac
    g = per_class(dac.divergence, settings.alpha, settings.beta)
    p, q = log_p.exp(), log_q.exp()
    # Probabilities that fp32 cannot hold are one block: the promise is for what it can.
    m = torch.stack(
        [
            naive.clip_mask(row, *(x[i] for x in levels), dac.quantile, dac.keep_target)
            for i, row in enumerate(p.float().double())
        ]
    )
    mass = (m * p).sum(-1, keepdim=True)
    if dac.rest == "renormalize":
        kept = (m * q).sum(-1, keepdim=True)
        # Of a class kept in part, m p is compared with m q: the logarithms differ by the same log m.
        shared = log_of(m) * (m > 0)
        value = (m > 0) * g(log_p + shared - log_of(mass), log_q + shared - log_of(kept))
    else:
        value = m * g(log_p, log_q)
    value = value.sum(-1)
    if dac.rest == "bucket":
        left = (((1 - m) * p).sum(-1), ((1 - m) * q).sum(-1))
        value = value + g(log_of(left[0]), log_of(left[1]))
    coverage = dac.coverage * mass[:, 0].log()
    return value - (coverage - coverage.detach())


def spans_of(numbers: list[int]) -> bool:
    return any(a == b >= 0 for a, b in zip(numbers, numbers[1:], strict=False))


def objective(settings, network, student: Tensor, teacher: Tensor, targets, spans, fitted, seen: int, counts):
    """student: [N, V] logits, of which the first `seen` rows are distilled; fitted: which rows have a target."""
    plain = student.log_softmax(-1).clamp(min=FLOOR).gather(1, targets[:, None])[:, 0]
    loss = -settings.sft_weight * plain[fitted].sum() / counts.sft
    student, teacher = student[:seen] / settings.temperature, teacher / settings.temperature
    log_q, log_p = log_probabilities(student), log_probabilities(teacher)
    if settings.token_loss == "dac_kl":
        dac = settings.dac
        if network is None:
            levels = log_p.new_full((seen,), dac.lower), log_p.new_full((seen,), dac.upper)
        else:
            levels = network.levels(log_p, log_q)
        token = dac_kl(settings, log_p, log_q, levels)
    else:
        token = per_class(settings.token_loss, settings.alpha, settings.beta)(log_p, log_q)
    loss = loss + settings.token_weight * token.sum() / counts.token
    if spans_of(spans[:seen].tolist()):
        span = naive.span_correlation(student, teacher, spans[:seen].tolist(), settings.span.distance)
        loss = loss + settings.span_weight * span.sum() / counts.span
    return loss


class Network:
    """`ClipNetwork` in float64, written out."""

    def __init__(self, network):
        self.top_k, self.start, self.bend = network.top_k, network.START, network.BEND
        self.inner, self.outer = copy.deepcopy(network.inner).double(), copy.deepcopy(network.outer).double()

    def parameters(self) -> list[Tensor]:
        return [*self.inner.parameters(), *self.outer.parameters()]

    def levels(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            k = min(self.top_k, log_p.shape[1])
            top_p, ids = log_p.topk(k)
            tops, tails, entropies = [], [], []
            for logs, top in ((log_p, top_p), (log_q, log_q.gather(1, ids))):
                filler = top.new_full((len(top), self.top_k - k), -20.0)
                tops.append(torch.cat((top.clamp(min=-20.0), filler), 1))
                tails.append((1 - top.exp().sum(-1, keepdim=True)).clamp(min=1e-6).log())
                entropies.append(-(logs.exp() * logs).sum(-1, keepdim=True))
            features = torch.cat((*tops, *tails, *entropies), -1) / 10
        raw = self.outer(torch.nn.functional.silu(self.inner(features)))
        below, above = ((raw + (raw**2 + self.bend**2).sqrt()) / 2).unbind(-1)
        return below / (1 + below + above), (1 + below) / (1 + below + above)
