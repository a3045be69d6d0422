"""The elementwise parts of the objective, which torch.compile can fuse: rows in, rows and their sums out, no indices.

What is left out searches or gathers (the clip's edges, the targets, the spans) and goes on eagerly between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from redistill.config import ObjectiveSettings
from redistill.losses.dac_kl import Classes, clipped_classes
from redistill.losses.divergences import Distributions, distributions, to_logits
from redistill.losses.f_divergences import f_divergence


class Elementwise:
    """Functions with the settings bound, the same whether compiled or not.

    distributions, to_logits: as in `losses.divergences`. clipped: (both, m) -> `Classes`, for DAC-KL. whole: both ->
    the token loss [n] and its gradient for log q [n, V], for an f-divergence. None where the token loss is another.
    Compiled for any number of rows (and once more for a single one); any device, nothing done before the first call.
    """

    def __init__(self, settings: ObjectiveSettings):
        def fuse(function: Any) -> Any:
            return torch.compile(function, dynamic=True, fullgraph=True) if settings.compile else function

        self.distributions, self.to_logits = fuse(distributions), fuse(to_logits)
        clipped, whole = _clipped(settings), _whole(settings)
        self.clipped = None if clipped is None else fuse(clipped)
        self.whole = None if whole is None else fuse(whole)


def _clipped(settings: ObjectiveSettings) -> Callable[[Distributions, Tensor], Classes] | None:
    if settings.token_loss != "dac_kl":
        return None
    rest, parts = settings.dac.rest, f_divergence(settings.dac.divergence, settings.alpha, settings.beta)
    assert parts is not None

    def clipped(both: Distributions, m: Tensor) -> Classes:
        return clipped_classes(both, m, rest, parts)

    return clipped


def _whole(settings: ObjectiveSettings) -> Callable[[Distributions], tuple[Tensor, Tensor]] | None:
    parts = f_divergence(settings.token_loss, settings.alpha, settings.beta)
    if parts is None:
        return None

    def whole(both: Distributions) -> tuple[Tensor, Tensor]:
        value, by_log_q = parts(*both)
        return value.sum(-1), by_log_q

    return whole
