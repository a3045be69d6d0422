"""A teacher of another tokenizer than the student's (`teacher.align`): the student's is then the run's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from redistill.config import Config
from redistill.loading import load_tokenizer
from redistill.models import check_forward, shared_vocabulary
from redistill.pieces import Pieces
from redistill.teachers.aligned import AlignedTeacher
from redistill.teachers.local import frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def tokenizers_of(config: Config) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase | None]:
    """The run's, and the teacher's own where it is another."""
    teacher = load_tokenizer(config.teacher.model_name_or_path, config.teacher.model_revision)
    if config.teacher.align is None:
        return teacher, None
    assert config.student.model_name_or_path is not None
    return load_tokenizer(config.student.model_name_or_path, config.student.model_revision), teacher


def aligned(
    config: Config,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    device: str,
) -> AlignedTeacher:
    """`teacher`, on `device`, for a student of the first tokenizer. Raises ValueError for a tokenizer whose ids are
    no bytes, and for a model that lacks ids of its tokenizer."""
    ours, theirs = (Pieces(each, config.data.template) for each in tokenizers)
    size = shared_vocabulary(tokenizers[0], tokenizers[0], student, student)
    their_size = shared_vocabulary(tokenizers[1], tokenizers[1], teacher, teacher)
    for model, rows in ((student, size), (teacher, their_size)):
        check_forward(model, rows)
    inner = frozen(teacher, their_size, torch.device(device), config.teacher)
    return AlignedTeacher(inner, ours, theirs, size, config.teacher.align_top_k)
