"""What the student wrote earlier, and how much of its own writing it is trained on."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from redistill.sample import Edit, Sample


class ReplayBuffer:
    """First in, first out: keeps the last `capacity` student answers (revised, where SCRG revised them)."""

    def __init__(self, capacity: int):
        self._samples: deque[Sample] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._samples)

    def push(self, samples: Sequence[Sample]) -> None:
        """Keep `samples`, the oldest ones falling out past the capacity."""
        self._samples.extend(samples)

    def draw(self, count: int, generator: torch.Generator) -> list[Sample]:
        """`count` different kept samples (all, in random order, if fewer are kept)."""
        order = torch.randperm(len(self._samples), generator=generator)[:count].tolist()
        return [self._samples[place] for place in order]

    def state(self) -> list[dict[str, Any]]:
        """Plain lists and numbers, for a checkpoint."""
        return [asdict(sample) for sample in self._samples]

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        """Put back what `state` returned."""
        self._samples.clear()
        self._samples.extend(_sample(record) for record in state)


def _sample(record: dict[str, Any]) -> Sample:
    edits = tuple(
        Edit(**{**edit, "before": tuple(edit["before"]), "kl_tokens": tuple(edit.get("kl_tokens", ()))})
        for edit in record["edits"]
    )
    names = ("prompt", "response", "behaviour", "advantages", "teacher_prompt")
    rows = {name: tuple(record.get(name, ())) for name in names}
    return Sample(**{**record, **rows, "edits": edits})


@dataclass
class ShareSchedule:
    """The share of student answers among the samples (`lmbda`).

    constant (step 0): `share` stays as set. adaptive (after DistiLLM, arXiv 2402.03898): it starts low and grows
    by `step`, up to `maximum`, whenever the validation loss is more than `epsilon` nats above the lowest seen
    since it last grew: training on references alone has then begun to overfit. (DistiLLM compares with the
    loss at the last growth instead, so that a loss that first falls and then rises never counts.)
    """

    share: float
    maximum: float
    step: float = 0.0
    epsilon: float = 0.0
    lowest: float = math.inf

    def update(self, validation_loss: float) -> None:
        """Take note of a validation loss (nats per token) and move the share if it rose."""
        if validation_loss > self.lowest + self.epsilon:
            self.share = min(self.share + self.step, self.maximum)
            self.lowest = validation_loss
        self.lowest = min(self.lowest, validation_loss)
