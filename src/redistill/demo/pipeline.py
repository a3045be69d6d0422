"""`redistill demo`: prune, distil and measure a real model, with nothing to download but one package."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from redistill.config import Config, load_config
from redistill.console import evaluation_table, marked_from_sample, show_revision
from redistill.demo.teacher import prepare_teacher
from redistill.evaluation.results import peak_memory_bytes
from redistill.prepare import Prepared, prepare
from redistill.run import Outcome, train
from redistill.runlog import read
from redistill.sample import Edit, Sample
from redistill.splits import load_split
from redistill.steplog import distinct_n

HERE = Path(__file__).parent
REVISIONS_SHOWN = 3
DISTINCT_SHOWN = 0.8


def run_demo(
    folder: Path, console: Console, *, steps: int | None = None, overrides: Iterable[str] = (), seed: int = 0
) -> bool:
    """The whole pipeline in `folder`; True when it came to its end, False when it was interrupted.

    Raises ValueError when the teacher's package is missing, or `folder` holds a run with other settings.
    """
    started = time.perf_counter()
    with console.status("Preparing the teacher (the first time takes half a minute)"):
        teacher = prepare_teacher()
    config = demo_config(teacher, [*overrides, *([f"training.max_steps={steps}"] if steps else [])], seed)
    with console.status("Choosing the student's layers"):
        prepared = prepare(config)
    outcome = train(config, folder, console, prepared=prepared, started=started)
    if not outcome.finished:
        console.print(f"\nSaved at step {outcome.step}. Run the same command again to go on from there.")
        return False
    _show(config, prepared, folder, outcome, time.perf_counter() - started, console)
    return True


def demo_config(teacher: Path, overrides: Iterable[str], seed: int) -> Config:
    """The packaged recipe with the places filled in."""
    places = [f"teacher.model_name_or_path={json.dumps(str(teacher))}", f"data.path={json.dumps(str(HERE))}"]
    return load_config(HERE / "recipe.yaml", [*places, f"training.seed={seed}", *overrides])


def _show(
    config: Config, prepared: Prepared, folder: Path, outcome: Outcome, seconds: float, console: Console
) -> None:
    console.print()
    console.print(evaluation_table(outcome.rows))
    console.print(
        Text(f"{outcome.step} steps, {seconds / 60:.1f} minutes, {peak_memory_bytes() / 1e9:.1f} GB")
    )
    train = load_split(config, prepared.tokenizer, config.data.path, config.data.split, config.data.limit)
    asked = zip(train.samples, train.questions, strict=True)
    questions = {sample.prompt: text for sample, text in asked}
    records = list(read(folder / "revisions.jsonl"))
    if records:
        console.print(Text(f"\n{all_revisions(records)} Those that helped most:"))
    for record in telling_revisions(records, REVISIONS_SHOWN):
        sample = sample_of(record)
        marked = marked_from_sample(
            sample,
            prepared.tokenizer,
            prompt=questions.get(sample.prompt),
            log_likelihood=record["log_likelihood_after"],
        )
        console.print()
        console.print(show_revision(marked))
    teacher = config.teacher.model_name_or_path
    console.print("\nType next:", style="bold")
    me = own_command()
    for line in (
        f'{me} revise "Why is the sky blue?" --student {outcome.student} --teacher {teacher}',
        f"{me} report {folder}        # one page: scores, curves, revisions, answers",
        f"{me} evaluate {outcome.student} --teacher {teacher} --data YOUR.jsonl",
        f"{me} train RECIPE.yaml        # your own teacher, student and data; see recipes/",
    ):
        console.print(Text(f"  {line}"), soft_wrap=True)


def own_command() -> str:
    """How the user can call us again: by name where the shell finds it, else as this process was called."""
    script = Path(sys.argv[0])
    if script.name == "redistill" and shutil.which("redistill") is None:
        return os.path.relpath(script)
    return "redistill"


def all_revisions(records: Sequence[dict]) -> str:
    """What the revisions did as a whole: the ones shown are the best and speak for themselves only."""
    gains = [record["log_likelihood_after"] - record["log_likelihood_before"] for record in records]
    return (
        f"{len(gains)} answers were revised. The teacher's log-likelihood per token rose in "
        f"{sum(gain > 0 for gain in gains)} of them; its mean change is {sum(gains) / len(gains):+.2f} nats."
    )


def telling_revisions(records: Iterable[dict], count: int) -> list[dict]:
    """The `count` revisions by which the teacher's log-likelihood of the answer rose most, each prompt once,
    among those in which something stands before and behind the correction, and that hardly repeat themselves: a loop
    is probable to any teacher."""
    best: dict[str, dict] = {}
    for record in records:
        written = len(record["after_ids"]) - record["position"]
        if record["position"] < 2 or written < 4 or distinct_n(record["after_ids"], 2) < DISTINCT_SHOWN:
            continue
        record["gain"] = record["log_likelihood_after"] - record["log_likelihood_before"]
        held = best.get(record["prompt"])
        if held is None or record["gain"] > held["gain"]:
            best[record["prompt"]] = record
    return sorted(best.values(), key=lambda record: -record["gain"])[:count]


def sample_of(record: dict) -> Sample:
    """A revision record as the sample it came from."""
    edit = Edit(
        record["position"],
        record["rejected"],
        record["replacement"],
        record["kl_before"],
        record["log_likelihood_before"],
        tuple(record["before_ids"]),
    )
    return Sample(tuple(record["prompt_ids"]), tuple(record["after_ids"]), "rollout", "", (edit,))
