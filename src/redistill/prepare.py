"""A recipe -> models, tokenizer and samples, checked before any training, and the trainer of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from redistill.clock import Clock
from redistill.config import Config, TeacherSettings
from redistill.hub import check_pushing
from redistill.loading import best_device, output_rows
from redistill.models import (
    add_lora,
    check_forward,
    ends_of,
    load_model,
    load_tokenizer,
    parameter_count,
    shared_vocabulary,
)
from redistill.pruned import pruned_student
from redistill.sample import Sample, SampleTable
from redistill.splits import Split, check_column, load_evaluation, load_heldout, load_training
from redistill.stream import known
from redistill.teacher_answers import with_teacher_answers
from redistill.teachers.cached import CachedTeacher
from redistill.teachers.own_tokenizer import aligned, tokenizers_of
from redistill.teachers.served import ServedTeacher
from redistill.teachers.signal import Teacher
from redistill.trainer import DistillTrainer
from redistill.wrapped import fits_whole

log = logging.getLogger(__name__)

# For what a recipe's `training` section leaves out: our own bar instead of the engine's, every step logged.
ENGINE_DEFAULTS = {"disable_tqdm": True, "report_to": "none", "logging_steps": 1}


@dataclass(frozen=True)
class Prepared:
    """Everything a `DistillTrainer` needs, over one vocabulary. teacher: None where its model is not needed.
    remote: what is trained from in its place, a cache or a server, or a teacher of another tokenizer."""

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    train: Split
    heldout: Split
    evaluation: Split
    remote: Teacher | None = None


def prepare(config: Config) -> Prepared:
    """Load what `config` names. Raises ValueError (and DataError) with what is wrong and what to do."""
    check_pushing(config)
    settings = config.teacher
    tokenizer, own = tokenizers_of(config)
    # Data first: a broken file should not cost the loading of two models.
    train = load_training(config, tokenizer, own)
    check_column(config.data, known(train.samples))
    heldout = load_heldout(config, tokenizer, own)
    evaluation = load_evaluation(config, tokenizer, heldout)
    # Where the engine will put them: block influence, teacher answers and the first measurement come before it.
    # Models that no single GPU has room for are read by the CPU in these.
    fits = fits_whole(config.training, config.rollout.gather)
    device = "cpu" if config.training.get("use_cpu") or not fits else best_device()
    cache = None if settings.cache is None else CachedTeacher(Path(settings.cache))
    remote = cache is not None or settings.server is not None
    teacher = load_teacher(config, device) if not remote or _asks_for_the_model(config) else None
    if own is not None:
        assert teacher is not None
        student = load_student(config, None, tokenizer, train.samples, device)
        said_by = aligned(config, student, teacher, (tokenizer, own), device)
        return Prepared(student, None, tokenizer, train, heldout, evaluation, said_by)
    student = load_student(config, teacher, tokenizer, train.samples, device)
    rows = teacher or (cache.vocabulary if cache is not None else output_rows(settings.model_name_or_path))
    vocabulary = shared_vocabulary(tokenizer, tokenizer, student, rows)
    for model in filter(None, (student, teacher)):
        check_forward(model, vocabulary)
    if config.data.responses == "teacher":
        assert teacher is not None
        eos = ends_of(tokenizer, teacher, config.data.template)
        answered = with_teacher_answers(train.samples, teacher, config, eos=eos, vocabulary=vocabulary)
        train = replace(train, samples=SampleTable(answered))
    served = ServedTeacher(settings.server, tokenizer, vocabulary) if settings.server is not None else None
    if cache is not None:
        cache.check(config, tokenizer, vocabulary, known(train.samples), heldout.samples)
    if remote and "evaluation" not in config.model_fields_set:
        teacher = None  # what is measured after training would need it once more
    sizes = [parameter_count(model) for model in (student, teacher) if model is not None]
    log.info("parameters of the student, and of the teacher where it stays loaded: %s", sizes)
    return Prepared(student, teacher, tokenizer, train, heldout, evaluation, cache or served)


def _asks_for_the_model(config: Config) -> bool:
    """Whether a recipe with a cache or a server needs the model too: for what is done before or after training."""
    asked = {
        "student.prune": config.student.prune is not None,
        "data.responses: teacher": config.data.responses == "teacher",
        "the section evaluation": "evaluation" in config.model_fields_set,
    }
    if why := [name for name, wanted in asked.items() if wanted]:
        log.warning("the teacher's model is loaded besides, for %s", " and ".join(why))
    return bool(why)


def load_teacher(config: Config, device: str) -> PreTrainedModel:
    """The model that the recipe learns from, on `device` or wherever its settings put it."""
    settings = config.teacher
    return load_model(
        settings.model_name_or_path,
        dtype=settings.dtype,
        revision=settings.model_revision,
        attn_implementation=settings.attn_implementation,
        device="cpu" if settings.offload else device,
        device_map=settings.device_map,
        bits=bits_of(settings),
    )


def bits_of(teacher: TeacherSettings) -> Literal[4, 8] | None:
    """Of a quantized teacher's weights."""
    return 8 if teacher.load_in_8bit else 4 if teacher.load_in_4bit else None


def in_folder(config: Config, folder: Path) -> Config:
    """`config` with the engine's options as our commands run it, in `folder`."""
    training = {**ENGINE_DEFAULTS, **config.training, "output_dir": str(folder)}
    return config.model_copy(update={"training": training})


def trainer_of(
    config: Config,
    prepared: Prepared,
    callbacks: Sequence[TrainerCallback] = (),
    new_clock: Callable[[], Clock] = Clock,
) -> DistillTrainer:
    """The trainer of what was prepared, without the engine's own printer; `config` is one of `in_folder`."""
    teacher = prepared.remote or prepared.teacher
    assert teacher is not None
    trainer = DistillTrainer(
        prepared.student,
        teacher,
        config,
        prepared.tokenizer,
        prepared.train.samples,
        prepared.heldout.samples,
        callbacks=list(callbacks),
        new_clock=new_clock,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def load_student(
    config: Config,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    device: str,
) -> PreTrainedModel:
    """The student as the recipe says, on `device`: loaded, or pruned from the teacher, which must be there for that;
    with LoRA where set."""
    settings = config.student
    if settings.prune is not None:
        assert teacher is not None
        student = pruned_student(config, settings.prune, teacher, tokenizer, samples)
    else:
        assert settings.model_name_or_path is not None
        student = load_model(
            settings.model_name_or_path,
            dtype=settings.dtype,
            revision=settings.model_revision,
            attn_implementation=settings.attn_implementation,
            device=device,
        )
        own = load_tokenizer(settings.model_name_or_path, settings.model_revision)
        shared_vocabulary(own, tokenizer, student, student if teacher is None else teacher)
    if settings.lora is None:
        return student
    if student.name_or_path and Path(student.name_or_path).is_dir():
        # The adapter states it, and may be loaded from another working directory.
        student.name_or_path = str(Path(student.name_or_path).resolve())
    # peft draws from torch's own generator, which the engine seeds only later.
    with torch.random.fork_rng():
        torch.manual_seed(int(config.training.get("seed", 42)))
        # Its wrapper answers to everything that the engine and we ask of a model.
        return cast(PreTrainedModel, add_lora(student, settings.lora))
