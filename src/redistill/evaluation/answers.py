"""Every answer of a model to some prompts, one batch after the other, kept as it comes.

A batch holds prompts of like length, in an order that depends on prompts and seeds alone. A run that was broken
off asks its unfinished batches again, whole, so that it ends with the answers of an unbroken one, to the bit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from redistill.chat import decode_response
from redistill.evaluation.kept import KeptLines, digest
from redistill.evaluation.rouge import RougeL
from redistill.evaluation.score import exactly
from redistill.generate import generate
from redistill.runlog import read
from redistill.sample import Sample
from redistill.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Seed = int | Literal["greedy"]
Tell = Callable[[str, int], None]
"""Called with what is being done and how many prompts of it are done since the last call."""
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many prompts are done, and how many there are."""


@dataclass(frozen=True)
class Questions:
    """What is asked: N prompts, the accepted answers of each, the most new tokens of each answer."""

    samples: Sequence[Sample]
    references: Sequence[tuple[str, ...]]
    limits: Sequence[int]

    def settings(self) -> dict[str, Any]:
        """Digests of the three: answers to other prompts, or scored otherwise, are not these."""
        prompts = digest([sample.prompt for sample in self.samples])
        return {"prompts": prompts, "references": digest(self.references), "limits": digest(self.limits)}


@dataclass(frozen=True)
class Writing:
    """How a model answers: once greedily, if `greedy`, and once per seed with `temperature` and `top_p`.

    eos: ids that end an answer. vocabulary: ids from here on are never said. batch_size: prompts at once.
    """

    seeds: tuple[int, ...]
    temperature: float
    top_p: float
    greedy: bool
    batch_size: int
    eos: frozenset[int]
    vocabulary: int

    def settings(self) -> dict[str, Any]:
        """What an answer depends on: neither on the other seeds nor, but for rounding, on the batch size."""
        kinds = {"temperature": self.temperature, "top_p": self.top_p}
        return {**kinds, "eos": sorted(self.eos), "vocabulary": self.vocabulary}

    def calls(self) -> list[tuple[str, Sampling, tuple[Seed, ...]]]:
        """What is done, how tokens are drawn, and for which seeds; the seeds share their batches."""
        calls: list[tuple[str, Sampling, tuple[Seed, ...]]] = []
        if self.greedy:
            calls.append(("greedy answers", Sampling(0.0), ("greedy",)))
        if self.seeds:
            named = ", ".join(map(str, self.seeds))
            sampling = Sampling(self.temperature, self.top_p)
            calls.append((f"sampled answers, seeds {named}", sampling, self.seeds))
        return calls


@dataclass(frozen=True)
class Pass:
    """One answer to every prompt, in the order of the prompts. scores: ROUGE-L of each, in percent.
    exact: whether it is a reference, see `score.exactly`. seconds: of writing them."""

    seed: Seed
    answers: Sequence[tuple[int, ...]]
    texts: Sequence[str]
    scores: Sequence[float]
    exact: Sequence[bool]
    seconds: float


def answer_key(record: Mapping[str, Any]) -> tuple[Seed, int]:
    """What tells one answer of a file from another."""
    return record["seed"], record["index"]


def answer_place(record: Mapping[str, Any]) -> tuple[int, int]:
    """Where an answer stands in its file: the greedy ones first, then seed by seed."""
    return -1 if record["seed"] == "greedy" else record["seed"], record["index"]


def counting(progress: Progress | None, total: int) -> Tell:
    """Adds up what is told, for `progress`."""
    done = 0

    def tell(what: str, more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(what, done, total)

    return tell


def ask_all(
    model: PreTrainedModel,
    questions: Questions,
    writing: Writing,
    tokenizer: PreTrainedTokenizerBase,
    kept: KeptLines,
    *,
    name: str,
    set_name: str | None,
    tell: Tell,
) -> list[Pass]:
    """Ask what `kept` does not hold yet, and return all: the greedy pass, then one per seed.

    name, set_name: written beside each answer. A seed's answers do not depend on the other seeds nor on the
    batch size, up to rounding; broken off and gone on with, they are the same to the bit.
    """
    rouge = RougeL()
    for what, sampling, runs in writing.calls():
        uniforms = torch.cat([_uniforms(run, questions.limits) for run in runs])
        for batch in _batches(questions, len(runs), writing.batch_size):
            keys = [_key(row, runs, len(questions.samples)) for row in batch]
            tell(what, 0)
            if not kept.holds(keys):
                started = time.perf_counter()
                answers = _answer(model, questions, [i for _, i in keys], sampling, uniforms[batch], writing)
                each = (time.perf_counter() - started) / len(batch)
                kept.append(
                    _record(name, set_name, key, answer, questions, tokenizer, rouge, each)
                    for key, answer in zip(keys, answers, strict=True)
                )
            tell(what, len(batch))
    kept.sort(answer_place)
    return [_pass(run, kept.records) for _, _, runs in writing.calls() for run in runs]


def read_answers(path: Path, seed: Seed, prompts: Sequence[str]) -> list[tuple[int, ...]]:
    """The kept answers of one seed to the first prompts of a set, as ids.

    Errors: ValueError where the file lacks one of them, or holds the answer to another prompt.
    """
    if not path.is_file():
        raise ValueError(
            f"there are no answers at {path}: give the file that an evaluation of the model wrote."
        )
    found = {record["index"]: record for record in read(path) if record["seed"] == seed}
    for index, prompt in enumerate(prompts):
        if index not in found:
            raise ValueError(
                f"{path} has no answer of seed {seed} to prompt {index}: evaluate that model again."
            )
        if found[index]["prompt"] != prompt:
            raise ValueError(
                f"{path} answers another prompt {index}: it was made on other data, or with another template "
                "or prompt length."
            )
    return [tuple(found[index]["ids"]) for index in range(len(prompts))]


def prompt_scores(path: Path, what: str = "rougeL", seeds: Sequence[Seed] | None = None) -> list[float]:
    """One score per prompt, the mean over sampling seeds: a row of what `significance.paired_bootstrap` takes.

    what: a number or truth value in the answers file (`rougeL` in percent, `exact_match` as 0 or 1).
    seeds: None takes every seed in the file but "greedy".
    Errors: ValueError for a file without such answers, or where a seed lacks a prompt.
    """
    by_prompt: dict[int, dict[Seed, float]] = {}
    for record in read(path):
        if record["seed"] in seeds if seeds is not None else record["seed"] != "greedy":
            by_prompt.setdefault(record["index"], {})[record["seed"]] = float(record[what])
    wanted = max((len(scores) for scores in by_prompt.values()), default=0)
    if not wanted or any(len(scores) != wanted for scores in by_prompt.values()):
        raise ValueError(f"{path} has not every prompt with every seed: let its evaluation come to an end.")
    return [statistics.fmean(by_prompt[index].values()) for index in sorted(by_prompt)]


def _batches(questions: Questions, runs: int, batch_size: int) -> Iterator[list[int]]:
    """Rows (seed after seed) in batches, the longest prompts first; a prompt's seeds stand together, so that
    `generate` reads it once."""
    count = len(questions.samples)
    prompts = [sample.prompt for sample in questions.samples]
    rows = sorted(range(runs * count), key=lambda row: (-len(prompts[row % count]), prompts[row % count]))
    return (rows[at : at + batch_size] for at in range(0, len(rows), batch_size))


def _key(row: int, runs: Sequence[Seed], prompts: int) -> tuple[Seed, int]:
    return runs[row // prompts], row % prompts


def _answer(
    model: PreTrainedModel,
    questions: Questions,
    indices: Sequence[int],
    sampling: Sampling,
    uniforms: Tensor,
    writing: Writing,
) -> list[tuple[int, ...]]:
    return generate(
        model,
        [questions.samples[index].prompt for index in indices],
        limits=[questions.limits[index] for index in indices],
        sampling=sampling,
        eos=writing.eos,
        generator=None,
        batch_size=writing.batch_size,
        vocabulary=writing.vocabulary,
        uniforms=uniforms,
    )


def _uniforms(run: Seed, limits: Sequence[int]) -> Tensor:
    """A seed's own random numbers, the same whatever other seeds are answered with it."""
    shape = (len(limits), max([0, *limits]))
    if run == "greedy":
        return torch.zeros(shape)
    return torch.rand(shape, generator=torch.Generator().manual_seed(run))


def _record(
    name: str,
    set_name: str | None,
    key: tuple[Seed, int],
    answer: tuple[int, ...],
    questions: Questions,
    tokenizer: PreTrainedTokenizerBase,
    rouge: RougeL,
    seconds: float,
) -> dict[str, Any]:
    """prompt: as the model read it, control tokens shown. answer: without them. seconds: of the batch, shared."""
    seed, index = key
    text, references = decode_response(answer, tokenizer), questions.references[index]
    return {
        "name": name,
        "set": set_name,
        "seed": seed,
        "index": index,
        "prompt": str(tokenizer.decode(list(questions.samples[index].prompt))),
        "ids": list(answer),
        "answer": text,
        "references": list(references),
        "rougeL": rouge.score(text, references),
        "exact_match": exactly(text, references),
        "seconds": seconds,
    }


def _pass(seed: Seed, records: Sequence[dict[str, Any]]) -> Pass:
    own = [record for record in records if record["seed"] == seed]
    return Pass(
        seed,
        [tuple(record["ids"]) for record in own],
        [record["answer"] for record in own],
        [record["rougeL"] for record in own],
        [record["exact_match"] for record in own],
        sum(record["seconds"] for record in own),
    )
