"""What `redistill evaluate` and `redistill revise` do between their options and what they print."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from redistill.chat import Template, end_id, to_sample
from redistill.console import marked_from_sample, position_table, show_revision
from redistill.data import load_examples
from redistill.evaluation.harness import evaluate_model
from redistill.evaluation.results import peak_memory_bytes, write_results
from redistill.evaluation.score import EvaluationRow
from redistill.generate import Sampling, generate
from redistill.models import end_of_text_ids, load_model, load_tokenizer, shared_vocabulary
from redistill.revision import Score, revise_samples, score
from redistill.sample import Example, Sample

TeacherToken = Literal["sample", "argmax"]


@dataclass(frozen=True)
class Request:
    """How prompts are written and answered; the fields are the command line's options."""

    data: str = ""
    split: str = "test"
    seeds: tuple[int, ...] = ()
    temperature: float = 1.0
    template: Template = "chat"
    max_prompt_length: int = 256
    max_new_tokens: int = 256
    batch_size: int = 32
    limit: int | None = None
    dtype: str = "float32"


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
            system=None,
            max_prompt_length=request.max_prompt_length,
            max_completion_length=request.max_new_tokens,
            on_long_prompt="truncate",
        )
        if isinstance(sample, str):
            raise ValueError(f"{example.source}: {sample}")
        pairs.append((sample, example))
    return pairs


def evaluate(
    model_name: str, teacher_name: str | None, request: Request, output: Path
) -> list[EvaluationRow]:
    """Rows for the teacher (if any) and the model; results.json and every answer go to `output`."""
    started = time.perf_counter()
    examples = load_examples(request.data, split=request.split, limit=request.limit).examples
    tokenizer = load_tokenizer(model_name)
    model = load_model(model_name, dtype=request.dtype)
    teacher = load_model(teacher_name, dtype=request.dtype) if teacher_name else None
    vocabulary = _vocabulary(tokenizer, model, teacher_name, teacher)
    pairs = to_samples(examples, tokenizer, request)
    rows = []
    for name, each in ((teacher_name, teacher), (model_name, model)):
        if each is None or name is None:
            continue
        row = evaluate_model(
            _short(name) + (" (teacher)" if each is teacher else ""),
            each,
            teacher if each is model else None,
            [sample for sample, _ in pairs],
            [example.references for _, example in pairs],
            tokenizer=tokenizer,
            seeds=request.seeds,
            temperature=request.temperature,
            top_p=1.0,
            greedy=True,
            max_new_tokens=request.max_new_tokens,
            batch_size=request.batch_size,
            eos=end_of_text_ids(tokenizer, each) | {end_id(tokenizer, request.template)},
            vocabulary=vocabulary,
            answers_path=output / f"answers-{'teacher' if each is teacher else 'student'}.jsonl",
            progress=None,
        )
        rows.append(row)
    write_results(
        output / "results.json",
        rows,
        seeds=list(request.seeds),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        model=model_name,
        teacher=teacher_name,
        request=asdict(request),
    )
    return rows


def _short(name: str) -> str:
    """A folder by its last part, a hub id as it is: a table has no room for paths."""
    return Path(name).name if Path(name).is_dir() else name


def _vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    teacher_name: str | None,
    teacher: PreTrainedModel | None,
) -> int:
    if teacher is None or teacher_name is None:
        return shared_vocabulary(tokenizer, tokenizer, model, model)
    return shared_vocabulary(tokenizer, load_tokenizer(teacher_name), model, teacher)


def revise(
    prompt: str,
    student_name: str,
    teacher_name: str,
    request: Request,
    *,
    rounds: int,
    teacher_token: TeacherToken,
    seed: int,
    console: Console,
) -> None:
    """Answer `prompt` with the student, correct it, and print each position's KL, the error and the outcome."""
    tokenizer = load_tokenizer(student_name)
    student, teacher = (load_model(name, dtype=request.dtype) for name in (student_name, teacher_name))
    vocabulary = _vocabulary(tokenizer, student, teacher_name, teacher)
    eos = end_of_text_ids(tokenizer, student) | {end_id(tokenizer, request.template)}
    generator, sampling = torch.Generator().manual_seed(seed), Sampling(request.temperature)
    (asked, _) = to_samples([Example(prompt, source="prompt")], tokenizer, request)[0]
    writing = {"sampling": sampling, "eos": eos, "generator": generator, "vocabulary": vocabulary}
    limit = request.max_new_tokens
    answer = generate(student, [asked.prompt], limits=[limit], batch_size=1, **writing)[0]
    written = Sample(asked.prompt, answer, "rollout", "prompt")

    def scored(sample: Sample) -> Score:
        options = {"vocabulary": vocabulary, "generator": generator, "batch_size": 1}
        return score(student, teacher, [sample], teacher_token=teacher_token, **options)[0]

    state = generator.get_state()
    seen = scored(written)
    # The same state again, so that the correction meets the very teacher tokens shown.
    generator.set_state(state)
    revised = revise_samples(
        student,
        teacher,
        [written],
        rounds=rounds,
        teacher_token=teacher_token,
        max_completion_length=limit,
        batch_size=1,
        **writing,
    )[0]
    likelihood = float(scored(revised).teacher_log_likelihood.mean()) if revised.edits else 0.0
    _print_revision(console, prompt, seen, written, revised, likelihood, tokenizer)


def _print_revision(
    console: Console,
    prompt: str,
    seen: Score,
    written: Sample,
    revised: Sample,
    likelihood: float,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokens = [str(tokenizer.decode([token])) for token in written.response]
    wanted = [str(tokenizer.decode([token])) for token in seen.teacher_token.tolist()]
    error = revised.edits[0].position if revised.edits else None
    console.print(position_table(tokens, seen.kl.tolist(), wanted, error))
    if not revised.edits:
        console.print(Text("The teacher agrees with every token: nothing to correct."))
        return
    for number in range(1, len(revised.edits) + 1):
        last = number == len(revised.edits)
        after = revised.response if last else revised.edits[number].before
        step = Sample(revised.prompt, after, "rollout", "", revised.edits[:number])
        gained = likelihood if last else None
        console.print(
            show_revision(marked_from_sample(step, tokenizer, prompt=prompt, log_likelihood=gained))
        )
