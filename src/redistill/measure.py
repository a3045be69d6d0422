"""A model measured on sets of prompts: those of a command (`Request`), or those of a training run (`Bench`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from redistill.chat import Template, to_sample
from redistill.config import Config
from redistill.console import CountDisplay
from redistill.data import load_examples
from redistill.evaluation.answers import read_answers
from redistill.evaluation.gains import gains
from redistill.evaluation.harness import evaluate_model
from redistill.evaluation.kept import Keep, OnOther
from redistill.evaluation.results import SetRecord, peak_memory_bytes, write_results
from redistill.evaluation.score import EvaluationRow
from redistill.evaluation.suites import Asked, data_root, load_suite, version_of
from redistill.models import ends_of, shared_vocabulary
from redistill.prepare import Prepared
from redistill.runlog import write_whole
from redistill.sample import Example, Sample


@dataclass(frozen=True)
class Request:
    """What is asked, and how prompts are written and answered; the fields are the command line's options, and
    system and data_name are a recipe's `data.system` and `data.name`.

    data, split: a data set of any kind. sets, data_root: names of `suites.SUITES` in its place, and where they
    lie ("" leaves that to `suites.data_root`). max_length: of prompt and answer together; None sets no limit.
    exposure_prompts: on how many prompts exposure bias is measured; 0 on none.
    """

    data: str = ""
    split: str = "test"
    sets: tuple[str, ...] = ()
    data_root: str = ""
    seeds: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = True
    template: Template = "chat"
    max_prompt_length: int = 256
    max_new_tokens: int = 256
    max_length: int | None = None
    batch_size: int = 32
    limit: int | None = None
    exposure_prompts: int = 128
    dtype: str = "float32"
    system: str | None = None
    data_name: str | None = None


def load_sets(request: Request) -> list[Asked]:
    """The sets of the request, or its data, which then is the only one and has no name.

    Errors: ValueError where both or neither are asked for, and those of `load_suite` and `load_examples`.
    """
    if bool(request.sets) == bool(request.data):
        raise ValueError("name what to ask: --sets dolly,vicuna, or a data set of your own with --data.")
    if request.data:
        examples = load_examples(
            request.data, name=request.data_name, split=request.split, limit=request.limit
        ).examples
        return [Asked("", version_of(examples), request.data, examples)]
    root = data_root(Path(request.data_root) if request.data_root else None)
    return [load_suite(name, root, limit=request.limit) for name in request.sets]


def record_of(asked: Asked) -> SetRecord:
    """What results.json says of a set."""
    return SetRecord(asked.name or asked.source, asked.version, len(asked.examples), asked.source)


def to_samples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, request: Request
) -> list[tuple[Sample, Example]]:
    """Examples as samples; prompts over the limit are cut, never left out: a score must not depend on it."""
    pairs = []
    for example in examples:
        sample = to_sample(
            example,
            tokenizer,
            template=request.template,
            system=request.system,
            max_prompt_length=request.max_prompt_length,
            max_completion_length=request.max_new_tokens,
            on_long_prompt="truncate",
        )
        if isinstance(sample, str):
            raise ValueError(f"{example.source}: {sample}")
        pairs.append((sample, example))
    return pairs


@dataclass(frozen=True)
class Place:
    """The files of one model on one set: FOLDER/SET/answers-WHO.jsonl and its kin; FOLDER itself for `--data`."""

    folder: Path
    asked: Asked
    who: str

    def file(self, kind: str) -> Path:
        """kind: answers, references or exposure."""
        return self.folder / self.asked.name / f"{kind}-{self.who}.jsonl"

    def keep(self, template: str, on_other: OnOther) -> Keep:
        """Where everything is kept."""
        return Keep(
            set=self.asked.name or None,
            version=self.asked.version,
            template=template,
            answers=self.file("answers"),
            references=self.file("references"),
            exposure=self.file("exposure"),
            on_other=on_other,
        )


@dataclass(frozen=True)
class SetBench:
    """What every row of a table over sets is measured with. on_other: see `KeptLines`."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    request: Request
    console: Console
    on_other: OnOther = "refuse"

    def row(
        self,
        name: str,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        place: Place,
        *,
        teacher_answers: Path | None = None,
    ) -> EvaluationRow:
        """One model on one set; what lies at `place` already is not made again.

        teacher: measures KL; `model` itself for the teacher's own row. teacher_answers: the file of its answers
        to this set, for exposure bias; None leaves that out.
        Errors: those of `evaluate_model` and `read_answers`; ValueError for a prompt that cannot be written.
        """
        request, tokenizer = self.request, self.tokenizer
        pairs = to_samples(place.asked.examples, tokenizer, request)
        samples = [sample for sample, _ in pairs]
        what = f" on {place.asked.name}" if place.asked.name else ""
        with CountDisplay(self.console, f"Measuring {name}{what}") as progress:
            return evaluate_model(
                name,
                model,
                teacher,
                samples,
                [example.references for _, example in pairs],
                tokenizer,
                seeds=request.seeds,
                temperature=request.temperature,
                top_p=request.top_p,
                greedy=request.greedy,
                max_new_tokens=request.max_new_tokens,
                max_length=request.max_length,
                batch_size=request.batch_size,
                eos=ends_of(tokenizer, model, request.template),
                vocabulary=self.vocabulary,
                keep=place.keep(request.template, self.on_other),
                progress=progress,
                teacher_answers=self._theirs(teacher_answers, samples),
            )

    def _theirs(self, path: Path | None, samples: Sequence[Sample]) -> list[tuple[int, ...]]:
        """The teacher's kept answers with the first seed to the prompts on which exposure bias is measured."""
        if path is None or not self.request.seeds:
            return []
        first = samples[: self.request.exposure_prompts]
        prompts = [str(self.tokenizer.decode(list(sample.for_teacher().prompt))) for sample in first]
        return read_answers(path, self.request.seeds[0], prompts) if prompts else []


@dataclass(frozen=True)
class Bench:
    """What every row of one table is measured with."""

    config: Config
    prepared: Prepared
    folder: Path
    console: Console

    def row(self, name: str) -> EvaluationRow:
        """Measure the teacher (`name` "teacher"), or the student as it is now; every answer is kept, and a
        measurement that was broken off goes on."""
        prepared, settings = self.prepared, self.config.evaluation
        teacher, tokenizer = prepared.teacher, prepared.tokenizer
        model = teacher if teacher is not None and name == "teacher" else prepared.student
        title = f"Measuring {name} on {len(prepared.evaluation.samples)} prompts"
        file = f"{name.replace(' ', '-')}.jsonl"
        with CountDisplay(self.console, title) as progress:
            return evaluate_model(
                name,
                model,
                teacher,
                prepared.evaluation.samples,
                prepared.evaluation.references,
                tokenizer=tokenizer,
                seeds=settings.seeds,
                temperature=settings.temperature,
                top_p=settings.top_p,
                greedy=settings.greedy,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                eos=ends_of(tokenizer, model, self.config.data.template),
                vocabulary=shared_vocabulary(
                    tokenizer, tokenizer, prepared.student, teacher or prepared.student
                ),
                # The run's folder has refused other settings, or was told to go on under them.
                keep=Keep(
                    template=self.config.data.template,
                    answers=self.folder / "answers" / file,
                    references=self.folder / "references" / file,
                    on_other="anew",
                ),
                progress=progress,
            )

    def rows_before(self, *, going_on: bool) -> list[EvaluationRow]:
        """Teacher and untrained student; measured once a run, kept for when it is interrupted."""
        kept = self.folder / "rows-before.json"
        if going_on and kept.is_file():
            return [EvaluationRow(**row) for row in json.loads(kept.read_text(encoding="utf-8"))]
        # A teacher of another tokenizer cannot be measured by the student's ids.
        rows = [] if self.prepared.teacher is None else [self.row("teacher")]
        rows.append(self.row("student before"))
        write_whole(kept, json.dumps([asdict(row) for row in rows]))
        return rows

    def finish(self, earlier: list[EvaluationRow], *, steps: int, seconds: float) -> list[EvaluationRow]:
        """Measure the trained student, write results.json, and return all rows."""
        rows = [*earlier, self.row("student after")]
        differences = gains(self.folder, "student after", "student before")
        write_results(
            self.folder / "results.json",
            rows,
            seeds=list(self.config.evaluation.seeds),
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes(),
            template=self.config.data.template,
            differences=[asdict(each) for each in differences],
            steps=steps,
            seed=self.config.training.get("seed", 42),
        )
        return rows
