"""What a teacher says at response positions, and the one interface of those who say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redistill.losses.quantile import top_classes
from redistill.losses.truncated import fold
from redistill.models import Head
from redistill.sample import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Hidden:
    """hidden: [N, G], the decoder's last states; head: makes logits of them, for some positions at a time."""

    hidden: Float[Tensor, "N G"]
    head: Head


@dataclass(frozen=True)
class TopK:
    """ids: the k most probable ones, different in a row. log_p: theirs and, last, the tail's: that of all else
    together; normalised, in nats, fp32.

    gaps: None, or V, where rows may hold fewer ids, or none where nothing is said: V then stands for no id (see
        `losses/truncated.py`) and comes behind those that are some."""

    ids: Int[Tensor, "N k"]
    log_p: Float[Tensor, "N C"]
    gaps: int | None = None

    def __getitem__(self, rows: slice) -> TopK:
        return replace(self, ids=self.ids[rows], log_p=self.log_p[rows])

    def to(self, device: torch.device) -> TopK:
        """The same on `device`."""
        return replace(self, ids=self.ids.to(device), log_p=self.log_p.to(device))

    @property
    def told(self) -> Bool[Tensor, " N"]:
        """Where something is said."""
        return self.ids[:, 0] != self.gaps

    def class_of(self, tokens: Int[Tensor, " N"]) -> Int[Tensor, "N 1"]:
        """The column of `log_p` that each token belongs to."""
        found = self.ids == tokens[:, None]
        kept = found.any(-1, keepdim=True)
        return found.int().argmax(-1, keepdim=True).masked_fill(~kept, self.ids.shape[1])


def most_probable(logits: Float[Tensor, "N V"], k: int) -> TopK:
    """The signal cut down to its k most probable ids, or to all of V where that is not more."""
    log_p = logits.float().log_softmax(-1)
    ids = top_classes(log_p, min(k, log_p.shape[1]))[1]
    return TopK(ids, fold(log_p, ids))


# Hidden states and head, or logits [N, V], or the k most probable classes with a tail.
Signal = Hidden | Tensor | TopK


class Teacher(Protocol):
    """Says at every response position of some samples, one sample after the other, what it would write there.

    vocabulary: the number of ids that it tells apart. model: the model itself where it is in this process; None where
        only its signal can be had.
    """

    @property
    def vocabulary(self) -> int: ...

    @property
    def model(self) -> PreTrainedModel | None: ...

    def signal(self, samples: Sequence[Sample]) -> Signal:
        """Without gradient, on any device, each response read behind the teacher's own prompt where a sample has one.
        Not called for no samples, but of a sharded model."""
        ...


def picked(signal: Signal, positions: Int[Tensor, " n"]) -> Signal:
    """What is said at these positions alone."""
    if isinstance(signal, Hidden):
        return Hidden(signal.hidden[positions.to(signal.hidden.device)], signal.head)
    if isinstance(signal, TopK):
        return replace(
            signal,
            ids=signal.ids[positions.to(signal.ids.device)],
            log_p=signal.log_p[positions.to(signal.log_p.device)],
        )
    return signal[positions.to(signal.device)]


def at(signal: Signal, rows: slice) -> Tensor | TopK:
    """What is said at some of the positions: logits [n, V], or a `TopK`."""
    return signal.head.logits(signal.hidden[rows]) if isinstance(signal, Hidden) else signal[rows]
