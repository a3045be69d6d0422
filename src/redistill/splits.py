"""The data of a recipe, split by split, as samples under its template and limits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from redistill.chat import to_sample
from redistill.config import Config, DataSettings
from redistill.data import DataError, load_examples
from redistill.sample import Example, Sample, SampleTable
from redistill.stream import stream_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """One split of the data: samples, and of each the accepted responses and the question as text."""

    samples: Sequence[Sample] = ()
    references: tuple[tuple[str, ...], ...] = ()
    questions: tuple[str, ...] = ()


def load_training(
    config: Config, tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase | None = None
) -> Split:
    """The samples that are trained on, without their texts; a `Stream` where the recipe streams them."""
    data = config.data
    if data.streaming:
        return Split(stream_of(config, _converter(config, tokenizer, own)))
    return Split(load_split(config, tokenizer, data.path, data.split, data.limit, own).samples)


def load_split(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    split: str,
    limit: int | None,
    own: PreTrainedTokenizerBase | None = None,
) -> Split:
    """Samples of one split; what was left out is counted and said. own: the teacher's tokenizer, if another."""
    data = config.data
    loaded = load_examples(
        path,
        name=data.name,
        split=split,
        limit=limit,
        max_bad_share=data.max_bad_share,
        teacher_prompt=data.teacher_prompt,
    )
    for problem in loaded.problems[:5]:
        log.warning("left out: %s: %s", problem.source, problem.what)
    return to_split(config, tokenizer, loaded.examples, own)


def load_heldout(
    config: Config, tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase | None = None
) -> Split:
    """What validation reads: `data.eval_path` or `data.eval_split`; nothing without either."""
    place = heldout_of(config.data)
    return load_split(config, tokenizer, *place, config.data.eval_limit, own) if place else Split()


def heldout_of(data: DataSettings) -> tuple[str, str] | None:
    """Path and split of the held-out data; None where there is none."""
    if data.eval_path is None and data.eval_split is None:
        return None
    return data.eval_path or data.path, data.eval_split or ("test" if data.eval_path else data.split)


def load_evaluation(config: Config, tokenizer: PreTrainedTokenizerBase, heldout: Split) -> Split:
    """What is answered and scored: `evaluation.path`, or else the held-out data."""
    settings = config.evaluation
    if settings.path is not None:
        return load_split(config, tokenizer, settings.path, settings.split or "test", settings.limit)
    end = settings.limit
    return Split(heldout.samples[:end], heldout.references[:end], heldout.questions[:end])


def to_split(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    own: PreTrainedTokenizerBase | None = None,
) -> Split:
    """Examples -> samples, under the recipe's template and limits."""
    convert, samples, texts, left_out = _converter(config, tokenizer, own), SampleTable(), [], []
    for example in examples:
        sample = convert(example)
        if isinstance(sample, str):
            left_out.append(f"{example.source}: {sample}")
        else:
            samples.append(sample)
            texts.append((example.references, question(example)))
    for line in left_out[:5]:
        log.warning("left out: %s", line)
    if left_out:
        log.warning("%d of %d records left out by the length limits", len(left_out), len(examples))
    if examples and not samples:
        raise DataError(
            f"{Path(config.data.path).name}: no record is left; the first: {left_out[0]}. Where prompts are too "
            "long, raise data.max_prompt_length, or set data.on_long_prompt: truncate."
        )
    return Split(samples, *(tuple(column) for column in zip(*texts, strict=True))) if texts else Split()


def _converter(
    config: Config, tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase | None
) -> Callable[[Example], Sample | str]:
    return partial(
        to_sample,
        tokenizer=tokenizer,
        template=config.data.template,
        system=config.data.system,
        max_prompt_length=config.data.max_prompt_length,
        max_completion_length=config.rollout.max_completion_length,
        on_long_prompt=config.data.on_long_prompt,
        max_teacher_prompt_length=config.data.max_teacher_prompt_length or config.data.max_prompt_length,
        teacher_tokenizer=own,
    )


def question(example: Example) -> str:
    """What is asked, without the template: the last turn of a conversation, with its context."""
    text = example.prompt if isinstance(example.prompt, str) else example.prompt[-1].content
    return f"{text}\n\n{example.context}" if example.context else text


def check_column(data: DataSettings, samples: Sequence[Sample]) -> None:
    """Raises DataError where no sample has the column of the teacher's prompts that the recipe names."""
    named = data.teacher_prompt != DataSettings.model_fields["teacher_prompt"].default
    if named and not any(sample.teacher_prompt for sample in samples):
        raise DataError(
            f"no record of {data.path} has the column {data.teacher_prompt!r} that data.teacher_prompt names."
        )
