"""A teacher whose signal was written beforehand (`redistill cache-teacher`): its model is not loaded.

FOLDER/manifest.json says what was written, and under which settings; the signal itself is in shards (`store.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from redistill.config import Config
from redistill.sample import Sample
from redistill.teachers.signal import TopK
from redistill.teachers.store import Shards, key_of, unpack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """Under what a cache was written; all of it but `dtype` and the limits must be the same where it is read.

    teacher: id or folder. weights: digest of the model's weights. tokenizer, chat_template: digests. vocabulary: ids
    that were told apart. k: entries a position. dtype: of the teacher's weights.
    """

    teacher: str
    weights: str
    tokenizer: str
    template: str
    chat_template: str | None
    system: str | None
    vocabulary: int
    k: int
    dtype: str
    max_prompt_length: int
    max_completion_length: int
    format: int = FORMAT

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Raises ValueError where there is none, or one that this version cannot read."""
        path = folder / MANIFEST
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            manifest = Manifest(**{field.name: record[field.name] for field in fields(Manifest)})
        except FileNotFoundError:
            raise ValueError(
                f"{folder} holds no teacher's cache (no {MANIFEST}): write one with "
                f"`redistill cache-teacher RECIPE {folder}`."
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise ValueError(
                f"{path} cannot be read ({type(problem).__name__}: {problem}): write the cache anew elsewhere."
            ) from None
        if manifest.format != FORMAT:
            raise ValueError(
                f"{path} is of format {manifest.format}, and this redistill reads {FORMAT}: write it anew."
            )
        return manifest


def text_settings(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides which ids a record becomes, as far as a manifest has it."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    chat = str(tokenizer.chat_template) if config.data.template == "chat" else None
    return {
        "tokenizer": _digest(vocabulary),
        "template": config.data.template,
        "chat_template": None if chat is None else _digest(chat),
        "system": config.data.system,
        "max_prompt_length": config.data.max_prompt_length,
        "max_completion_length": config.rollout.max_completion_length,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# What a user would say, and where it is set.
_WORDS = {
    "tokenizer": "another tokenizer",
    "template": "another data.template",
    "chat_template": "another chat template",
    "system": "another data.system",
    "max_prompt_length": "another data.max_prompt_length",
    "max_completion_length": "another rollout.max_completion_length",
}
# These change single rows only, which then are missing.
LIMITS = ("max_prompt_length", "max_completion_length")


class CachedTeacher:
    """Reads a cache, memory-mapped. Errors: ValueError where there is none, or a damaged one."""

    model = None

    def __init__(self, folder: Path):
        self.folder, self.manifest = folder, Manifest.read(folder)
        self._shards = Shards(folder)

    @property
    def vocabulary(self) -> int:
        """See `Teacher`."""
        return self.manifest.vocabulary

    def check(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: int,
        train: Sequence[Sample],
        heldout: Sequence[Sample] = (),
    ) -> None:
        """Raises ValueError, with the reason, unless the cache is of the recipe's teacher and text, and holds every
        sample. vocabulary: what student and teacher share."""
        again = f"write the recipe's own with `redistill cache-teacher RECIPE` into another folder than {self.folder}"
        mine, now = asdict(self.manifest), text_settings(config, tokenizer)
        name = config.teacher.model_name_or_path
        if Path(name).name != Path(self.manifest.teacher).name:
            raise ValueError(
                f"{self.folder} is the cache of {self.manifest.teacher}, not of {name}: {again}."
            )
        other = [key for key, value in now.items() if mine[key] != value]
        if wrong := [key for key in other if key not in LIMITS]:
            words = ", ".join(f"{_WORDS[key]} ({mine[key]}, not {now[key]})" for key in wrong)
            raise ValueError(f"{self.folder} was written under {words}: {again}.")
        if vocabulary != self.vocabulary:
            raise ValueError(
                f"{self.folder} tells {self.vocabulary} ids apart, and this student and teacher share {vocabulary}: "
                f"{again}."
            )
        if empty := [sample for sample in train if not sample.response]:
            raise ValueError(
                f"{len(empty)} samples have no response, the first from {empty[0].source or 'an unnamed record'}: "
                "the student would answer them, which a cached teacher has not read. Leave them out, or leave out "
                "teacher.cache."
            )
        samples = [*train, *(sample for sample in heldout if sample.response)]
        missing = [sample for sample in samples if key_of(sample) not in self._shards]
        if missing:
            why = " and ".join(f"{_WORDS[key]} ({mine[key]}, not {now[key]})" for key in other)
            raise ValueError(
                f"{self.folder} lacks {len(missing)} of the {len(samples)} samples, the first from "
                f"{missing[0].source or 'an unnamed record'}{', and was written under ' + why if why else ''}: run "
                f"`redistill cache-teacher RECIPE {self.folder}`, which adds what is missing."
            )

    def signal(self, samples: Sequence[Sample]) -> TopK:
        """See `Teacher`. Raises ValueError for a sample that is not there."""
        rows = [self._row(sample) for sample in samples]
        entries, tails = (np.concatenate(column) for column in zip(*rows, strict=True))
        return unpack(entries, tails, self.vocabulary)

    def _row(self, sample: Sample) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        if (key := key_of(sample)) not in self._shards:
            raise ValueError(
                f"{self.folder} has no row of a {sample.origin} from {sample.source or 'an unnamed record'}: only "
                "what was cached can be trained on."
            )
        return self._shards.row(key)
