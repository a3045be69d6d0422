"""The losses on plain tensors: `[N, V]` student logits first, `[N, V]` teacher logits second, `[N]` out."""

from redistill.losses.clip_network import ClipNetwork
from redistill.losses.dac_kl import DacTerms, dac_kl, dac_terms
from redistill.losses.divergences import (
    DIVERGENCES,
    adaptive_kl,
    alpha_beta,
    cross_entropy,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    todi,
    total_variation,
)
from redistill.losses.policy_gradient import policy_gradient
from redistill.losses.span_correlation import span_correlation

__all__ = [
    "DIVERGENCES",
    "ClipNetwork",
    "DacTerms",
    "adaptive_kl",
    "alpha_beta",
    "cross_entropy",
    "dac_kl",
    "dac_terms",
    "forward_kl",
    "jensen_shannon",
    "policy_gradient",
    "reverse_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "span_correlation",
    "todi",
    "total_variation",
]
