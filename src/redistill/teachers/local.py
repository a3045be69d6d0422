"""A teacher that is a model in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from redistill.generate import answering
from redistill.models import head_of
from redistill.packing import packs
from redistill.sample import Sample
from redistill.settings import TeacherSettings
from redistill.teachers.offload import Offloaded
from redistill.teachers.reading import Reader, SignalReader, Whole, read_responses
from redistill.teachers.signal import Hidden, Teacher
from redistill.wrapped import gather_head


@dataclass(frozen=True)
class LocalTeacher:
    """model: of which the first `vocabulary` ids count. packed: whether it `packs`. offloaded: how it comes to the
    device where it reads, if it is not always there."""

    model: PreTrainedModel
    vocabulary: int
    packed: bool = False
    offloaded: Offloaded | None = None

    def signal(self, samples: Sequence[Sample]) -> Hidden:
        """See `Teacher`."""
        asked = [each.for_teacher() for each in samples]
        return self.said(lambda: read_responses(self.model, asked, packed=self.packed)[0])

    def said(self, read: Callable[[], Tensor]) -> Hidden:
        """The signal of hidden states that `read` makes with the model."""
        head = head_of(self.model, self.vocabulary)
        if self.offloaded is not None:
            head = replace(head, module=self.offloaded.head)
        with self.there(), answering(self.model):
            hidden = read()
        gather_head(head.module)
        return Hidden(hidden, head)

    def there(self) -> AbstractContextManager[None]:
        """The model is where it reads inside."""
        return nullcontext() if self.offloaded is None else self.offloaded.there()


class LocalReader:
    """A teacher of this process that reads of a response what it has not read; see `SignalReader`."""

    def __init__(self, teacher: LocalTeacher):
        self._teacher = teacher
        self._reader = Reader(teacher.model, packed=teacher.packed, keep=True)

    def read(self, samples: Sequence[Sample], rows: Sequence[int], first: Sequence[int]) -> Hidden:
        """As `Reader.read`."""
        asked = [each.for_teacher() for each in samples]
        return self._teacher.said(lambda: self._reader.read(asked, rows, first))


def reader_of(teacher: Teacher, again: bool) -> SignalReader:
    """How `teacher` reads the same responses. again: more than once, so that it pays to remember."""
    return LocalReader(teacher) if again and isinstance(teacher, LocalTeacher) else Whole(teacher)


def frozen(
    model: PreTrainedModel, vocabulary: int, device: torch.device, settings: TeacherSettings
) -> LocalTeacher:
    """`model` as a teacher, which is not trained: on `device`, or as `settings` say: there while it reads only, or
    where it was put when it was loaded.

    Raises ValueError where no device has the output layer.
    """
    head = head_of(model.eval().requires_grad_(False), vocabulary).module
    if any(parameter.is_meta for parameter in head.parameters()):
        raise ValueError(
            "teacher.device_map leaves the teacher's output layer without a device: name one that has room for all "
            "of the model, or use teacher.load_in_4bit, teacher.offload or teacher.cache."
        )
    offload = settings.offload
    if not (offload or settings.device_map or settings.load_in_8bit or settings.load_in_4bit):
        nn.Module.to(model, device)
    teacher = LocalTeacher(model, vocabulary, offloaded=Offloaded(model, head, device) if offload else None)
    with teacher.there():
        return replace(teacher, packed=packs(model, vocabulary))


def teacher_of(teacher: nn.Module | Teacher, vocabulary: int, packed: bool = False) -> Teacher:
    """`teacher`, or the one that a model is."""
    if isinstance(teacher, nn.Module):
        return LocalTeacher(cast(PreTrainedModel, teacher), vocabulary, packed)
    return teacher
