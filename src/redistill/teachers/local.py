"""A teacher that is a model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from redistill.cache import a_row_each, can_be_cut, would_be_cut
from redistill.generate import Decoding, answering
from redistill.models import head_of, plain_model, read_all
from redistill.packing import apart, lay_out, packs
from redistill.sample import Sample
from redistill.settings import TeacherSettings
from redistill.teachers.offload import Offloaded
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
        head = head_of(self.model, self.vocabulary)
        if self.offloaded is not None:
            head = replace(head, module=self.offloaded.head)
        with self.there(), answering(self.model):
            hidden, _ = read_responses(self.model, samples, packed=self.packed)
        gather_head(head.module)
        return Hidden(hidden, head)

    def there(self) -> AbstractContextManager[None]:
        """The model is where it reads inside."""
        return nullcontext() if self.offloaded is None else self.offloaded.there()


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


def read_responses(
    model: nn.Module, samples: Sequence[Sample], *, keep: bool = False, packed: bool = False
) -> tuple[Tensor, Decoding | None]:
    """Hidden states [N, H] that predict the N response tokens, sample after sample; and what was read, if `keep` and
    if it can be cut; a sequence a row then. packed: see `packing.packs`.

    Without samples one token is read all the same: of a sharded model other ranks wait for this one's part.
    """
    device = next(model.parameters()).device
    keep = keep and would_be_cut(plain_model(model).config)
    rows = [each.prompt + each.response for each in samples]
    # What follows the last token is only asked by who writes on.
    read = rows if keep else [row[:-1] for row in rows]
    layout = lay_out(read or [(0,)], packed=packed)
    select = torch.cat(
        [
            torch.arange(0),
            *(
                torch.arange(start + len(each.prompt) - 1, start + len(row) - 1)
                for start, row, each in zip(layout.first, rows, samples, strict=bool(samples))
            ),
        ]
    )
    where = None if layout.position_ids is None else layout.position_ids.to(device)
    mask = apart(model, where) if keep and where is not None else None
    hidden, cache = read_all(model, layout.input_ids.to(device), select.to(device), where, keep, mask)
    if cache is None or not can_be_cut(cache):
        return hidden, None
    lengths = torch.tensor([len(row) for row in rows], device=device)
    longest = max(map(len, rows))
    if where is not None:
        a_row_each(cache, torch.tensor(layout.first, device=device), longest)
    return hidden, Decoding(cache, (torch.arange(longest, device=device) < lengths[:, None]).long(), lengths)
