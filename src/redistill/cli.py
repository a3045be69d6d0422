"""The command line. Each command imports what it needs when it runs, so that `--help` is there at once."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    name="redistill",
    help="Distil a large language model into a small one, and revise what the student writes on the way.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one setting; repeatable.")
]
Output = Annotated[Path | None, typer.Option("--output", help="Run folder.")]
Template = Annotated[Literal["chat", "alpaca", "plain"], typer.Option(help="How a prompt is written.")]
TeacherToken = Annotated[Literal["sample", "argmax"], typer.Option(help="Where a correction comes from.")]
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
Anew = Annotated[bool, typer.Option("--anew", help="Delete what lies there from other settings.")]
Tasks = Annotated[
    str, typer.Option(help="Tasks of lm-evaluation-harness besides, or alone: arc_easy,hellaswag.")
]
IncludePath = Annotated[Path | None, typer.Option(help="Folder with task files of your own.")]
EvaluationOutput = Annotated[Path, typer.Option(help="Folder for results.json and the answers.")]


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    steps: Annotated[int | None, typer.Option(min=1, help="Fewer (or more) optimizer steps than 54.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same table.")] = 0,
    set_: Set = None,
) -> None:
    """Distil a real 135M model into one of 99M on this machine, in about ten minutes."""
    from redistill.demo.pipeline import run_demo

    finished = run_demo(output, _console(), steps=steps, overrides=set_ or (), seed=seed)
    raise typer.Exit(0 if finished else 130)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="See recipes/ for examples.")],
    set_: Set = None,
    output: Output = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on even under changed settings.")] = False,
    method: Annotated[
        str | None, typer.Option(help="Lay a method over the recipe: sft, kd, gkd, minillm, mgsr, ..")
    ] = None,
) -> None:
    """Train a student as RECIPE.yaml says; a run that was stopped goes on from its last checkpoint."""
    from redistill.config import load_config
    from redistill.console import evaluation_table
    from redistill.run import train as run_training

    config = load_config(recipe, set_ or (), method)
    console = _console()
    for doubt in config.warnings():
        console.print(f"warning: {doubt}", style="yellow", highlight=False)
    folder = output or Path(str(config.training.get("output_dir", Path("runs") / recipe.stem)))
    outcome = run_training(config, folder, console, go_on=resume)
    if not outcome.finished:
        console.print(f"Saved at step {outcome.step}. The same command goes on from there.")
        raise typer.Exit(130)
    if outcome.rows:
        console.print(evaluation_table(outcome.rows))
    console.print(f"The student lies in {outcome.student}.", soft_wrap=True)


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the model to shorten.")],
    output: Annotated[Path, typer.Argument(help="Folder for the shorter one.")],
    keep: Annotated[str, typer.Option(help='How many layers, a list "0,1,5", or a rule ("every_second").')],
    data: Annotated[
        str | None,
        typer.Option(help="Training data whose prompts measure block influence; ours if left out."),
    ] = None,
    template: Template = "chat",
    prompts: Annotated[int, typer.Option(min=1, help="How many of them.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
) -> None:
    """Make a student from some of a model's layers, by default those with the most influence."""
    from redistill.data import load_examples
    from redistill.demo.pipeline import HERE
    from redistill.models import load_model, load_tokenizer, parameter_count
    from redistill.prepare import texts_of
    from redistill.run import save_model
    from redistill.student import prune_layers, select_layers

    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty: name a new folder for the pruned model")
    tokenizer = load_tokenizer(model)
    examples = load_examples(data or str(HERE), split="train", limit=prompts).examples
    whole = load_model(model, dtype=dtype)
    layers = select_layers(whole, keep, texts_of(examples, tokenizer, template))
    pruned = prune_layers(whole, layers)
    save_model(pruned, tokenizer, output)
    before, after = parameter_count(whole) / 1e6, parameter_count(pruned) / 1e6
    _console().print(
        f"Kept {len(layers)} layers {list(layers)}: {before:.1f}M -> {after:.1f}M parameters, in {output}.",
        soft_wrap=True,
        highlight=False,
    )


@app.command()
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
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many records.")] = None,
    exposure_prompts: ExposurePrompts = 128,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    tasks: Tasks = "",
    include_path: IncludePath = None,
    anew: Anew = False,
    output: EvaluationOutput = Path("runs/evaluate"),
) -> None:
    """Score a model's answers; what was broken off goes on with those that are missing."""
    from redistill import commands

    request = commands.Request(
        data=data,
        split=split,
        sets=_names(sets),
        data_root=data_root,
        seeds=_integers(seeds, "--seeds"),
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
    commands.evaluate(
        model,
        teacher,
        request,
        output,
        _console(),
        teacher_row=teacher_row,
        teacher_answers=teacher_answers,
        tasks=_names(tasks),
        include_path=include_path,
        anew=anew,
    )


@app.command()
def compare(
    plan: Annotated[Path, typer.Argument(metavar="COMPARE.yaml", help="Methods, budget, seeds, evaluation.")],
    output: Annotated[Path | None, typer.Option(help="Folder for the runs and the table.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at once, in place of the file's.")] = None,
) -> None:
    """Train several methods under one budget from one start, and write one table with significance."""
    from redistill.compare.command import compare as run_comparison

    whole = run_comparison(plan, output or Path("runs") / plan.stem, _console(), jobs=jobs)
    raise typer.Exit(0 if whole else 1)


@app.command(hidden=True)
def compare_run(folder: Path) -> None:
    """One run of a comparison, as FOLDER/asked.json says: what `compare` starts, each in a process of its own."""
    from redistill.compare.child import work

    work(folder, _console())


@app.command()
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
    from redistill import commands

    request = commands.Request(template=template, max_new_tokens=max_new_tokens, temperature=temperature)
    commands.revise(
        prompt,
        student,
        teacher,
        request,
        rounds=rounds,
        teacher_token=teacher_token,
        seed=seed,
        console=_console(),
    )


def _console():
    from rich.console import Console

    return Console()


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _integers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{option} is {text!r}: give whole numbers with commas, like 10,20,30") from None


def _quiet() -> None:
    """Libraries speak through our own lines; their progress bars and notices would bury them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The engine's own option, which it will rename in its next major version; nothing a user can mend here.
    warnings.filterwarnings("ignore", message=".*activation_checkpointing.*", category=FutureWarning)


def main() -> None:
    """Run the command line; what a user can mend is one sentence on stderr, never a traceback."""
    _quiet()
    try:
        app()
    except ValueError as problem:
        _fail(str(problem), 2)
    except KeyboardInterrupt:
        _fail("stopped; what was saved before goes on with the same command", 130)
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail(f"the disk is full ({problem.filename or 'while saving'}): the last checkpoint is whole; "
              "make room and run the same command again", 1)  # fmt: skip
    except RuntimeError as problem:
        if type(problem).__name__ != "NotFinite":
            raise
        _fail(str(problem), 1)


def _fail(message: str, code: int) -> None:
    print(f"redistill: {message}", file=sys.stderr)
    raise SystemExit(code)
