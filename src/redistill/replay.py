"""What the student wrote earlier, and how much of its own writing it is trained on."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from redistill.config import Config
from redistill.sample import Edit, Sample
from redistill.settings import RolloutSettings

# The fields of a sample in their order, numbers as arrays.
_Packed = tuple[Any, ...]
# Bytes, generously: a tuple, four arrays, the flags and the source's text; and an edit with its numbers.
_AROUND, _EDIT = 1000, 320


class ReplayBuffer:
    """First in, first out: keeps the last `capacity` student answers (revised, where SCRG revised them).

    They lie packed, and of what was edited only where and what: `most_bytes` bounds it.
    """

    def __init__(self, capacity: int):
        self._kept: deque[_Packed] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._kept)

    def push(self, samples: Sequence[Sample]) -> None:
        """Keep `samples`, the oldest ones falling out past the capacity."""
        self._kept.extend(map(_packed, samples))

    def draw(self, count: int, generator: torch.Generator) -> list[Sample]:
        """`count` different kept samples (all, in random order, if fewer are kept)."""
        order = torch.randperm(len(self._kept), generator=generator)[:count].tolist()
        return [_unpacked(self._kept[place]) for place in order]

    def state(self) -> list[dict[str, Any]]:
        """Plain lists and numbers, for a checkpoint."""
        return [asdict(_unpacked(each)) for each in self._kept]

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        """Put back what `state` returned."""
        self._kept.clear()
        self.push([_sample(record) for record in state])


def _packed(sample: Sample) -> _Packed:
    """At 4 bytes an id, and not up to 36."""
    edits = tuple(replace(edit, before=(), kl_tokens=()) for edit in sample.edits)
    values = (getattr(replace(sample, edits=edits), field.name) for field in fields(Sample))
    return tuple(map(_array, values))


def _array(value: Any) -> Any:
    if not isinstance(value, tuple) or not value or not isinstance(value[0], int | float):
        return value
    return array("i" if isinstance(value[0], int) else "d", value)


def _unpacked(kept: _Packed) -> Sample:
    values: list[Any] = [tuple(value) if isinstance(value, array) else value for value in kept]
    return Sample(*values)


def capacity(rollout: RolloutSettings) -> int:
    """How many answers the buffer keeps: none where none is ever taken from it."""
    return rollout.replay_capacity if rollout.replay_ratio > 0 else 0


def most_bytes(config: Config) -> int:
    """The most that a full buffer holds under a recipe's settings: 4 bytes an id, 16 more per token of an answer with
    the policy gradient, and what Python needs around a sample, a correction and a name."""
    rollout, answer = config.rollout, config.rollout.max_completion_length
    prompts = config.data.max_prompt_length
    prompts += config.data.max_teacher_prompt_length or prompts
    numbers = 4 * (prompts + answer) + 16 * answer * (config.objective.policy.weight > 0)
    around = _AROUND + _EDIT * config.revision.rounds + 4 * len(config.data.path)
    return capacity(rollout) * (numbers + around)


def _sample(record: dict[str, Any]) -> Sample:
    edits = tuple(Edit(**{**edit, "before": (), "kl_tokens": ()}) for edit in record["edits"])
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
    return Sample(**{**values, "edits": edits})


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
