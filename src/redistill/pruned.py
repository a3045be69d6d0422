"""A recipe's student out of its teacher, and the base that adapters on it state."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from redistill import ranks
from redistill.checkpoint import BASE, latest, save_model
from redistill.config import Config, PruneSettings
from redistill.loading import load_model
from redistill.sample import Sample
from redistill.student import prune_layers, select_layers

log = logging.getLogger(__name__)


def pruned_student(
    config: Config,
    prune: PruneSettings,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
) -> PreTrainedModel:
    """The layers of `teacher` that `prune` keeps, chosen on the first of `samples` where that asks for it.

    With LoRA they are saved in the run folder (`config.training["output_dir"]`), so that the adapters have a base to
    state; a run that goes on from a checkpoint has its layers from there.
    """
    folder = config.training.get("output_dir")
    base = Path(folder).resolve() / BASE if folder and config.student.lora is not None else None
    if base is not None and ranks.on_first(lambda: base.is_dir() and latest(base.parent) is not None):
        how, device = config.teacher, str(teacher.device)
        return load_model(base, dtype=how.dtype, attn_implementation=how.attn_implementation, device=device)
    prompts = [s.prompt + s.response for s in samples[: prune.prompts]]
    # Near ties may fall either way: one rank decides.
    layers = ranks.on_first(lambda: select_layers(teacher, prune.keep, prompts))
    log.info("student keeps layers %s of the teacher", list(layers))
    student = prune_layers(teacher, layers)
    if base is not None:
        ranks.on_first(lambda: save_model(student, tokenizer, base))
        student.name_or_path = str(base)
    return student
