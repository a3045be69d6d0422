"""The commands that look at finished models: evaluate, judge, compare, revise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from redistill.cli.options import (
    LONGEST_PROMPT,
    Anew,
    BatchSize,
    Dtype,
    Limit,
    TeacherToken,
    Template,
    integers,
    names,
    terminal,
)

# Of `evaluate`. "The papers" are MiniLLM and DistiLLM.
Data = Annotated[str, typer.Option(help="Data set with responses: hub id, folder, .jsonl or .parquet.")]
Sets = Annotated[
    str,
    typer.Option(help="In its place: dolly, self_instruct, vicuna, sinst, uinst, uinst_short, with commas."),
]
DataRoot = Annotated[
    str, typer.Option(help="Where the sets lie: $REDISTILL_DATA or ./data if left out, then the hub.")
]
TeacherAnswers = Annotated[
    Path | None, typer.Option(help="Its earlier answers, file or output folder, for exposure bias.")
]
Seeds = Annotated[str, typer.Option(help="One set of sampled answers each; the papers': 10,20,30,40,50.")]
PaperTemplate = Annotated[
    Literal["chat", "alpaca", "plain"], typer.Option(help="How a prompt is written; the papers': alpaca.")
]
PromptLength = Annotated[int, typer.Option(min=1, help="Longer prompts are cut; the papers': 256.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Longest answer; the papers': 256, so 512 in all.")]
MaxLength = Annotated[
    int | None, typer.Option(min=1, help="Longest prompt and answer together; none if left out.")
]
ExposurePrompts = Annotated[
    int, typer.Option(min=0, help="Prompts on which exposure bias is measured; 0: none.")
]
Tasks = Annotated[
    str, typer.Option(help="Tasks of lm-evaluation-harness besides, or alone: arc_easy,hellaswag.")
]
IncludePath = Annotated[Path | None, typer.Option(help="Folder with task files of your own.")]
AnswersFolder = Annotated[Path, typer.Argument(help="Output folder of `redistill evaluate`.")]
Row = Annotated[Literal["student", "teacher"], typer.Option(help="Whose answers in that folder.")]
JudgeSets = Annotated[
    str, typer.Option("--set", help="Only these sets, with commas; all in common if left out.")
]
JudgeTemplate = Annotated[
    Literal["chat", "alpaca"] | None,
    typer.Option(help="How the judge's prompt is laid out; its own if left out."),
]
Margin = Annotated[float, typer.Option(min=0, help="Nats by which an answer must lead; else it is a tie.")]
References = Annotated[bool, typer.Option(help="Show the judge a reference answer.")]
EvaluationOutput = Annotated[Path, typer.Option(help="Folder for results.json and the answers.")]


def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id or folder.")],
    data: Data = "",
    sets: Sets = "",
    data_root: DataRoot = "",
    teacher: Annotated[str | None, typer.Option(help="Measures forward KL to it, and adds its row.")] = None,
    teacher_row: Annotated[bool, typer.Option(help="Let the teacher answer too.")] = True,
    teacher_answers: TeacherAnswers = None,
    split: Annotated[str, typer.Option(help="Split, where the data has several.")] = "test",
    seeds: Seeds = "10,20,30",
    temperature: Annotated[float, typer.Option(help="Of the sampled answers; the papers': 1.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Of the sampled answers; the papers': 1.")] = 1.0,
    greedy: Annotated[bool, typer.Option(help="Answer greedily too; the papers do not.")] = True,
    template: PaperTemplate = "chat",
    max_prompt_length: PromptLength = 256,
    max_new_tokens: NewTokens = 256,
    max_length: MaxLength = None,
    batch_size: BatchSize = 32,
    limit: Limit = None,
    exposure_prompts: ExposurePrompts = 128,
    dtype: Dtype = "float32",
    tasks: Tasks = "",
    include_path: IncludePath = None,
    anew: Anew = False,
    output: EvaluationOutput = Path("runs/evaluate"),
) -> None:
    """Score a model's answers; what was broken off goes on with those that are missing."""
    from redistill.commands import Request
    from redistill.commands import evaluate as run_evaluation

    request = Request(
        data=data,
        split=split,
        sets=names(sets),
        data_root=data_root,
        seeds=integers(seeds, "--seeds"),
        temperature=temperature,
        top_p=top_p,
        greedy=greedy,
        template=template,
        max_prompt_length=max_prompt_length,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        batch_size=batch_size,
        limit=limit,
        exposure_prompts=exposure_prompts,
        dtype=dtype,
    )
    run_evaluation(
        model,
        teacher,
        request,
        output,
        terminal(),
        teacher_row=teacher_row,
        teacher_answers=teacher_answers,
        tasks=names(tasks),
        include_path=include_path,
        anew=anew,
    )


def judge(
    judge: Annotated[str, typer.Argument(help="Hub id or folder of the model that judges.")],
    first: AnswersFolder,
    second: AnswersFolder,
    first_row: Row = "student",
    second_row: Row = "student",
    set_: JudgeSets = "",
    references: References = True,
    template: JudgeTemplate = None,
    batch_size: BatchSize = 8,
    margin: Margin = 0.5,
    max_answer_tokens: Annotated[int, typer.Option(min=1, help="Longer answers are cut.")] = 256,
    max_question_tokens: Annotated[int, typer.Option(min=1, help="Longer questions are cut.")] = 512,
    limit: Limit = None,
    dtype: Dtype = "auto",
    anew: Anew = False,
    output: Annotated[Path, typer.Option(help="Folder for judge.json and the judgements.")] = Path(
        "runs/judge"
    ),
) -> None:
    """Let a model of yours compare two models' kept answers, blind and in both orders; goes on if broken off."""
    from redistill.evaluation.pairs import Evaluated
    from redistill.judging import JudgeRequest, judge_folders

    request = JudgeRequest(
        sets=names(set_),
        references=references,
        template=template,
        batch_size=batch_size,
        margin=margin,
        max_answer_tokens=max_answer_tokens,
        max_question_tokens=max_question_tokens,
        limit=limit,
        dtype=dtype,
    )
    sides = Evaluated(first, first_row), Evaluated(second, second_row)
    judge_folders(judge, *sides, request, output, terminal(), anew=anew)


def compare(
    plan: Annotated[Path, typer.Argument(metavar="COMPARE.yaml", help="Methods, budget, seeds, evaluation.")],
    output: Annotated[Path | None, typer.Option(help="Folder for the runs and the table.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at once, in place of the file's.")] = None,
) -> None:
    """Train several methods under one budget from one start, and write one table with significance."""
    from redistill.compare.command import compare as run_comparison

    whole = run_comparison(plan, output or Path("runs") / plan.stem, terminal(), jobs=jobs)
    raise typer.Exit(0 if whole else 1)


def compare_run(folder: Path) -> None:
    """One run of a comparison, as FOLDER/asked.json says: what `compare` starts, each in a process of its own."""
    from redistill.compare.child import work

    work(folder, terminal())


def revise(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    student: Annotated[str, typer.Option(help="Hub id or folder.")],
    teacher: Annotated[str, typer.Option(help="Hub id or folder, of the same vocabulary.")],
    rounds: Annotated[int, typer.Option(min=1, help="Corrections.")] = 1,
    teacher_token: TeacherToken = "sample",
    temperature: Annotated[float, typer.Option(min=0, help="Of the student; 0 is greedy.")] = 1.0,
    template: Template = "chat",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Let the student answer PROMPT and show what SCRG would correct, position by position."""
    from redistill.commands import Request
    from redistill.commands import revise as show

    request = Request(
        template=template,
        max_prompt_length=LONGEST_PROMPT,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    show(
        prompt,
        student,
        teacher,
        request,
        rounds=rounds,
        teacher_token=teacher_token,
        seed=seed,
        console=terminal(),
    )
