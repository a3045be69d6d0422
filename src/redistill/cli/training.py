"""The commands that make a student: demo, train, prune, export; and what is around them: cache-teacher, estimate,
profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from redistill.cli.options import BatchSize, Dtype, Output, Set, Template, terminal

if TYPE_CHECKING:
    from rich.console import Console

    from redistill.config import Config

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="See recipes/ for examples.")]
Method = Annotated[
    str | None, typer.Option(help="Lay a method over the recipe: sft, kd, gkd, minillm, mgsr, ..")
]
Json = Annotated[Path | None, typer.Option("--json", help="File that gets the same as JSON.")]


def demo(
    output: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    steps: Annotated[int | None, typer.Option(min=1, help="Fewer (or more) optimizer steps than 54.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same table.")] = 0,
    set_: Set = None,
) -> None:
    """Distil a real 135M model into one of 99M on this machine, in about ten minutes."""
    from redistill.demo.pipeline import run_demo

    finished = run_demo(output, terminal(), steps=steps, overrides=set_ or (), seed=seed)
    raise typer.Exit(0 if finished else 130)


def train(
    recipe: Recipe,
    set_: Set = None,
    output: Output = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on even under changed settings.")] = False,
    method: Method = None,
) -> None:
    """Train a student as RECIPE.yaml says; a run that was stopped goes on from its last checkpoint."""
    from redistill.console import evaluation_table
    from redistill.run import train as run_training

    console = terminal()
    config = _config(recipe, set_, method, console)
    folder = output or Path(str(config.training.get("output_dir", Path("runs") / recipe.stem)))
    outcome = run_training(config, folder, console, go_on=resume)
    if not outcome.finished:
        console.print(f"Saved at step {outcome.step}. The same command goes on from there.")
        raise typer.Exit(130)
    if outcome.rows:
        console.print(evaluation_table(outcome.rows))
    console.print(f"The student lies in {outcome.student}.", soft_wrap=True)


def estimate(
    recipe: Recipe,
    set_: Set = None,
    gpus: Annotated[
        int | None, typer.Option(min=0, help="How many; 0: the CPU. As here if left out.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=0.1, help="GiB of a GPU, or of the machine. As here.")
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(min=1e-3, help="TFLOP/s of a matrix product there; measured where it is this machine."),
    ] = None,
    savers: Annotated[
        bool, typer.Option("--savers", help="Show what each way to save memory brings.")
    ] = False,
    method: Method = None,
    json_: Json = None,
) -> None:
    """Say how much memory RECIPE.yaml takes before it runs, whether it fits, and what to switch if not."""
    from redistill.console import estimate_table, estimate_text, savers_table
    from redistill.estimate import estimate as run_estimate
    from redistill.estimate.machine import machine_for, rate_on

    console = terminal()
    config = _config(recipe, set_, method, console)
    machine = machine_for(config, gpus, memory)
    found = run_estimate(config, machine, rate_on(machine, config, tflops), savers)
    console.print(estimate_table(found))
    if savers:
        console.print(savers_table(found))
    console.print(estimate_text(found), markup=False, highlight=False, soft_wrap=True)
    _write(json_, found.record())


def cache_teacher(
    recipe: Recipe,
    output: Annotated[
        Path | None, typer.Argument(help="Folder for the cache; the recipe's teacher.cache if left out.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Ids kept at each token; all else is one outcome.")] = 128,
    batch_size: BatchSize = 8,
    set_: Set = None,
) -> None:
    """Write what the teacher says of RECIPE.yaml's data, so that training needs no teacher; goes on if broken off."""
    from redistill.caching import cache_teacher as write_cache

    console = terminal()
    config = _config(recipe, set_, None, console)
    folder = output or (Path(config.teacher.cache) if config.teacher.cache else None)
    if folder is None:
        raise ValueError(f"name a folder for the cache: redistill cache-teacher {recipe} FOLDER.")
    found = write_cache(config, folder, console, k=top_k, batch_size=batch_size)
    console.print(
        f"{folder} holds {found.rows} responses of {found.positions} tokens, {found.bytes / 1e6:.1f} MB; "
        f"{found.new} of them are new. Train with --set teacher.cache={folder} --set rollout.lmbda=0.",
        soft_wrap=True,
        highlight=False,
    )


def profile(
    recipe: Recipe,
    set_: Set = None,
    steps: Annotated[int, typer.Option(min=1, help="How many are measured, after one that is not.")] = 3,
    method: Method = None,
    json_: Json = None,
) -> None:
    """Show where the time and memory of RECIPE.yaml's training step go; nothing else is left behind."""
    from redistill.console import profile_table
    from redistill.profiling import profile as run_profile

    console = terminal()
    found = run_profile(_config(recipe, set_, method, console), steps)
    console.print(profile_table(found))
    worst, rate = found.slowest(), found.matmul_rate / 1e9
    console.print(
        f"A matrix product in {found.dtype} does {rate:,.0f} GFLOP/s here ({found.device}). Most time beyond that "
        f"floor goes to {worst.name}: {worst.seconds - found.floor(worst):.3f} s of its {worst.seconds:.3f} s.",
        highlight=False,
        soft_wrap=True,
    )
    _write(json_, found.record())


def _write(path: Path | None, record: dict[str, Any]) -> None:
    """The record and what it was made with, where a file is asked for."""
    import json

    from redistill.runlog import write_whole
    from redistill.versions import made_with

    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({**record, **made_with()}, indent=1) + "\n")


def _config(recipe: Path, overrides: list[str] | None, method: str | None, console: Console) -> Config:
    """The recipe under its options; what is doubtful in it is said."""
    from redistill.config import load_config

    config = load_config(recipe, overrides or (), method)
    for doubt in config.warnings():
        console.print(f"warning: {doubt}", style="yellow", highlight=False)
    return config


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
    dtype: Dtype = "auto",
) -> None:
    """Make a student from some of a model's layers, by default those with the most influence."""
    from redistill.checkpoint import save_model
    from redistill.data import load_examples
    from redistill.demo.pipeline import HERE
    from redistill.models import load_model, load_tokenizer, parameter_count
    from redistill.student import prune_layers, select_layers, texts_of

    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty: name a new folder for the pruned model")
    tokenizer = load_tokenizer(model)
    examples = load_examples(data or str(HERE), split="train", limit=prompts).examples
    whole = load_model(model, dtype=dtype)
    layers = select_layers(whole, keep, texts_of(examples, tokenizer, template))
    pruned = prune_layers(whole, layers)
    save_model(pruned, tokenizer, output)
    before, after = parameter_count(whole) / 1e6, parameter_count(pruned) / 1e6
    terminal().print(
        f"Kept {len(layers)} layers {list(layers)}: {before:.1f}M -> {after:.1f}M parameters, in {output}.",
        soft_wrap=True,
        highlight=False,
    )


def export(
    student: Annotated[str, typer.Argument(help="Hub id or folder.")],
    to: Annotated[Literal["gguf", "onnx", "int8"], typer.Option(help="gguf: llama.cpp. int8: torchao.")],
    output: Annotated[Path | None, typer.Option(help="New folder; STUDENT-FORMAT if left out.")] = None,
    outtype: Annotated[Literal["f32", "f16", "q8_0"], typer.Option(help="Numbers in a GGUF file.")] = "f16",
    prompts: Annotated[
        str | None, typer.Option(help="Data whose first 32 prompts both answer; ours if left out.")
    ] = None,
    template: Template = "chat",
) -> None:
    """Write a student in another format, and measure on 32 prompts how far it still says the same."""
    from redistill.data import load_examples
    from redistill.demo.pipeline import HERE
    from redistill.export import export as run_export

    split = "test" if prompts else "heldout"
    examples = load_examples(prompts or str(HERE), split=split, limit=32).examples
    place = output or Path(
        f"{student.rstrip('/')}-{to}" if Path(student).is_dir() else f"{Path(student).name}-{to}"
    )
    run_export(student, to, place, examples, terminal(), template=template, outtype=outtype)
