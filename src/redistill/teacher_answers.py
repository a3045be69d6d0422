"""The teacher's answers as training data (SeqKD, Kim & Rush 2016): written once, kept in a file, read ever after."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from redistill import ranks
from redistill.config import Config
from redistill.generate import draw_uniforms, generate
from redistill.loading import default_cache
from redistill.rollout import sampling
from redistill.runlog import alone, append_lines, read
from redistill.sample import Sample

log = logging.getLogger(__name__)

# Answers between two writes to the file: what a kill may cost.
AT_ONCE = 64


def with_teacher_answers(
    samples: Sequence[Sample],
    teacher: PreTrainedModel,
    config: Config,
    *,
    eos: frozenset[int],
    vocabulary: int,
) -> list[Sample]:
    """`samples` with the teacher's answers for responses, sampled as `rollout` says with `data.responses_seed`.

    In a run of several processes each rank answers its share; the first one keeps the file.
    They are appended to `answers_file(...)` as they come, so that a run that was stopped goes on behind the last
    one; every answer has random numbers of its own and does not depend on where it was stopped.
    Raises ValueError when the file named by `data.responses_path` was made from something else.
    """
    rollout = config.rollout
    key = fingerprint(samples, teacher, config, vocabulary)
    path = answers_file(config, key)
    generator = torch.Generator().manual_seed(config.data.responses_seed)
    uniforms = draw_uniforms(len(samples), rollout.max_completion_length, sampling(rollout), generator)

    def answer(rows: list[int]) -> list[tuple[int, ...]]:
        return generate(
            teacher,
            [samples[row].for_teacher().prompt for row in rows],
            limits=[rollout.max_completion_length] * len(rows),
            sampling=sampling(rollout),
            eos=eos,
            generator=None,
            batch_size=rollout.batch_size,
            vocabulary=vocabulary,
            uniforms=uniforms[rows],
        )

    # Several runs may want one file: the first writes it, the others wait and find it written.
    with alone(path.with_suffix(".lock")) if ranks.is_first() else nullcontext():
        kept = ranks.on_first(lambda: _kept(path, key))
        at_once = AT_ONCE * ranks.size()
        for start in range(len(kept), len(samples), at_once):
            part = range(start, min(start + at_once, len(samples)))
            log.info("the teacher answers %d of %d prompts", part.stop, len(samples))
            answers = ranks.divided(len(part), lambda places, part=part: answer([part[at] for at in places]))
            if ranks.is_first():
                append_lines(path, [json.dumps({"response": said}) for said in answers])
            kept += answers
    return [replace(sample, response=answer) for sample, answer in zip(samples, kept, strict=True)]


def fingerprint(samples: Sequence[Sample], teacher: PreTrainedModel, config: Config, vocabulary: int) -> str:
    """A name for all that the answers depend on: the teacher's weights, the prompts and the sampling."""
    how = sampling(config.rollout)
    text = json.dumps(
        [
            _weights(teacher),
            [sample.for_teacher().prompt for sample in samples],
            [how.temperature, how.top_p, how.top_k, how.min_p, config.rollout.max_completion_length],
            [config.data.responses_seed, vocabulary],
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def answers_file(config: Config, key: str) -> Path:
    """`data.responses_path`, or a file of its own under the user's cache."""
    if config.data.responses_path is not None:
        return Path(config.data.responses_path)
    return default_cache() / "teacher-answers" / f"{key}.jsonl"


def _weights(teacher: PreTrainedModel) -> list[float]:
    """A few numbers that other weights do not give."""
    with torch.no_grad():
        return [round(float(value.float().abs().sum()), 3) for value in list(teacher.parameters())[:8]]


def _kept(path: Path, key: str) -> list[tuple[int, ...]]:
    """The answers of an earlier run; the file is made, with its first line naming `key`, where there is none."""
    if not path.is_file():
        append_lines(path, [json.dumps({"key": key})])
        return []
    first, *rest = [*read(path)] or [{}]
    if first.get("key") != key:
        raise ValueError(
            f"{path} holds the answers of another teacher, to other prompts or under other sampling: name another "
            "data.responses_path, or remove the file."
        )
    return [tuple(record["response"]) for record in rest]
