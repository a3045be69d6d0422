"""What `redistill evaluate` and `redistill revise` do between their options and what they print."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from redistill.console import (
    answers_table,
    evaluation_table,
    marked_from_sample,
    position_table,
    show_revision,
    task_table,
)
from redistill.evaluation.results import SetRecord, peak_memory_bytes, write_results
from redistill.evaluation.score import EvaluationRow
from redistill.evaluation.suites import Asked
from redistill.evaluation.tasks import TaskScore, run_tasks
from redistill.loading import best_device
from redistill.marking import Question, load_models
from redistill.measure import Place, Request, SetBench, load_sets, record_of
from redistill.models import load_model, load_tokenizer, shared_vocabulary
from redistill.runlog import alone, write_whole
from redistill.sample import Sample
from redistill.scoring import Score, TeacherToken
from redistill.versions import made_with


@dataclass(frozen=True)
class Measured:
    """The rows of one set, and the set's record."""

    set: SetRecord
    rows: list[EvaluationRow]


def evaluate(
    model_name: str,
    teacher_name: str | None,
    request: Request,
    output: Path,
    console: Console,
    *,
    teacher_row: bool = True,
    teacher_answers: Path | None = None,
    tasks: Sequence[str] = (),
    include_path: Path | None = None,
    anew: bool = False,
) -> list[Measured]:
    """Each set's rows for the teacher (if any) and the model, printed; all is kept in `output`.

    teacher_row: whether the teacher answers too; without, it only measures KL, and `teacher_answers` (a file,
    or the output folder of an earlier evaluation) is what exposure bias is measured against.
    tasks, include_path: of lm-evaluation-harness, besides the sets or, without any, alone.
    anew: delete what lies in `output` from other settings instead of refusing to go on.
    """
    sets = load_sets(request) if request.data or request.sets or not tasks else []
    busy = f"another evaluation is at work in {output}: wait for it, stop it, or choose another --output."
    with alone(output / ".lock", busy=busy):
        started = time.perf_counter()
        if tasks:
            evaluate_tasks(model_name, tasks, request, output, console, include_path=include_path)
            if not sets:
                return []
        tokenizer = load_tokenizer(model_name)
        device = best_device()
        model = load_model(model_name, dtype=request.dtype, device=device)
        teacher = load_model(teacher_name, dtype=request.dtype, device=device) if teacher_name else None
        vocabulary = _vocabulary(tokenizer, model, teacher_name, teacher)
        bench = SetBench(tokenizer, vocabulary, request, console, "anew" if anew else "refuse")
        measured = []
        for asked in sets:
            rows, file = [], _answers_file(teacher_answers, asked)
            if teacher is not None and teacher_name is not None and teacher_row:
                place = Place(output, asked, "teacher")
                rows.append(bench.row(f"{_short(teacher_name)} (teacher)", teacher, teacher, place))
                file = file or place.file("answers")
            place = Place(output, asked, "student")
            rows.append(bench.row(_short(model_name), model, teacher, place, teacher_answers=file))
            measured.append(Measured(record_of(asked), rows))
            _print_measured(console, measured[-1])
        write_results(
            output / "results.json",
            [row for each in measured for row in each.rows],
            seeds=list(request.seeds),
            seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory_bytes(),
            sets=[each.set for each in measured],
            template=request.template,
            model=model_name,
            teacher=teacher_name,
            request=asdict(request),
        )
        console.print(f"Answers and results.json lie in {output}.", soft_wrap=True, highlight=False)
        return measured


def evaluate_tasks(
    model_name: str,
    tasks: Sequence[str],
    request: Request,
    output: Path,
    console: Console,
    *,
    include_path: Path | None = None,
) -> list[TaskScore]:
    """What lm-evaluation-harness says of the same checkpoint, printed and kept in tasks.json in `output`."""
    scores = run_tasks(
        model_name,
        tasks,
        limit=request.limit,
        batch_size=request.batch_size,
        device=best_device(),
        dtype=request.dtype,
        include_path=include_path,
    )
    record = {
        "model": model_name,
        "tasks": [asdict(score) for score in scores],
        "limit": request.limit,
        "lm_eval": metadata.version("lm_eval"),
        **made_with(),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "tasks.json", json.dumps(record, indent=1) + "\n")
    console.print(task_table(scores))
    console.print(f"tasks.json lies in {output}.", soft_wrap=True, highlight=False)
    return scores


def _print_measured(console: Console, measured: Measured) -> None:
    of = measured.set
    console.print()
    console.print(Text(f"{of.name}: {of.records} prompts, version {of.version}"), soft_wrap=True)
    console.print(evaluation_table(measured.rows))
    console.print(answers_table(measured.rows))


def _answers_file(path: Path | None, asked: Asked) -> Path | None:
    """The teacher's answers to the set: the file that was named, or where a folder has them."""
    return Place(path, asked, "teacher").file("answers") if path is not None and path.is_dir() else path


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
    models = load_models(student_name, teacher_name, request.dtype)
    written = models.answer(Question(prompt, request, teacher_token, seed))
    revised, after = models.revise(written, rounds)
    likelihood = float(after.teacher_log_likelihood.mean())
    _print_revision(console, prompt, written.score, written.sample, revised, likelihood, models.tokenizer)


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
