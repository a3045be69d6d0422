"""One training run in one folder: start it or go on with it, and leave a student that stands by itself."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from transformers import TrainerState

from redistill import checkpoint, ranks
from redistill.budget import Spending
from redistill.config import Config
from redistill.console import StepDisplay, training_progress
from redistill.evaluation.score import EvaluationRow
from redistill.hub import STUDENT
from redistill.in_step import readable
from redistill.measure import Bench
from redistill.prepare import Prepared, in_folder, prepare, trainer_of
from redistill.runlog import alone, write_whole
from redistill.trainer import DistillTrainer
from redistill.wrapped import refuse_engines
from redistill.yaml_lines import parse_value, read_yaml


@dataclass(frozen=True)
class Outcome:
    """finished: the last step was done. step: the last one done. student: where the saved model lies.
    rows: the table, where the recipe asks for one."""

    finished: bool
    step: int
    student: Path
    rows: tuple[EvaluationRow, ...] = ()


def train(
    config: Config,
    folder: Path,
    console: Console,
    *,
    prepared: Prepared | None = None,
    go_on: bool = False,
    started: float | None = None,
) -> Outcome:
    """Run `config` in `folder`; where a checkpoint lies there, from it.

    A recipe with an `evaluation` section is measured: teacher and student before, student after.
    prepared: models and samples already loaded, or None. go_on: continue even under changed settings.
    started: `time.perf_counter()` from which the seconds in results.json count; this call if left out.
    Under torchrun or `accelerate launch` every process calls this, and all must see the folder.
    Raises ValueError when the folder holds a run of another recipe, or another run is at work in it; LostRank when a
    process of this one has died.
    """
    started = time.perf_counter() if started is None else started
    busy = f"another process is at work in {folder}: wait for it, stop it, or choose another --output."
    training = config.training
    with ExitStack() as held:
        if ranks.is_first():
            held.enter_context(alone(folder / ".lock", busy=busy))
        held.enter_context(ranks.together(bool(training.get("use_cpu")), training.get("ddp_timeout", 1800)))
        return _train(config, folder, console, prepared, go_on, started)


def _train(
    config: Config, folder: Path, console: Console, prepared: Prepared | None, go_on: bool, started: float
) -> Outcome:
    refuse_engines(config.training)
    config = in_folder(config, folder)
    last = ranks.on_first(lambda: _enter(config, folder, console, go_on))
    if ranks.any_true(not (folder / "recipe.yaml").is_file()):
        raise ValueError(
            f"not every process of this run sees {folder}: choose an --output that all machines share."
        )
    prepared = prepared or prepare(config)
    bench, earlier = Bench(config, prepared, folder, console), []
    signals, bounded = checkpoint.SaveOnSignal(), Spending(config.budget).bounded
    # Before anything is measured: what the engine or the hub refuses should not cost that.
    shown = StepDisplay(console, tokenizer=prepared.tokenizer)
    trainer = trainer_of(config, prepared, [training_progress(shown=shown, bounded=bounded), signals])
    trainer.run_log.readers.append(shown.read)
    if measured := "evaluation" in config.model_fields_set and bool(prepared.evaluation.samples):
        with readable(prepared.student, prepared.teacher, gather=config.rollout.gather):
            earlier = ranks.on_first(lambda: bench.rows_before(going_on=last is not None))
    step, finished = _train_from(trainer, last, console)
    student = folder / STUDENT
    if not finished:
        return Outcome(False, step, student)
    trainer.save_student(student)
    seconds, rows = time.perf_counter() - started, []
    if measured:
        with readable(prepared.student, prepared.teacher, gather=config.rollout.gather):
            rows = ranks.on_first(lambda: bench.finish(earlier, steps=step, seconds=seconds))
    if rows and ranks.is_first():
        prompts = len(prepared.evaluation.samples)
        write_whole(student / "README.md", trainer.model_card([asdict(row) for row in rows], prompts))
    if trainer.args.push_to_hub and (address := trainer.upload_student(student)):
        console.print(f"The student is at {address}.", markup=False, highlight=False, soft_wrap=True)
    return Outcome(True, step, student, tuple(rows))


def _enter(config: Config, folder: Path, console: Console, go_on: bool) -> Path | None:
    """Make the folder this run's, and find the checkpoint it goes on from."""
    if checkpoint.latest(folder) is not None and not go_on:
        refuse_other_recipe(config, folder)
    for said in checkpoint.set_damaged_aside(folder):
        console.print(f"warning: {said}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    write_whole(folder / "recipe.yaml", config.to_yaml())
    checkpoint.clear_unfinished(folder)
    return checkpoint.latest(folder)


def _train_from(trainer: DistillTrainer, last: Path | None, console: Console) -> tuple[int, bool]:
    """Train to the end or to an interruption: the last step done, and whether it is the end."""
    if last is not None:
        done = TrainerState.load_from_json(str(last / "trainer_state.json")).global_step
        if trainer.ends_at(
            done
        ):  # killed while measuring, or run again: the engine would do one step too many
            console.print(f"Training was finished: reading {last}.", highlight=False)
            trainer.load_weights(last)
            trainer.state.global_step = done
            return done, True
        console.print(f"Going on from {last}.", highlight=False)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    return trainer.state.global_step, trainer.ends_at(trainer.state.global_step)


def refuse_other_recipe(config: Config, folder: Path) -> None:
    """Raises ValueError naming what differs between `config` and the recipe of the run in `folder`."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        return
    now = parse_value(config.to_yaml())
    try:
        before = read_yaml(path)[0]
    except ValueError as error:
        raise ValueError(f"{error} Remove that file to go on with the settings given now.") from None
    # A setting that did not exist then was as it is by default.
    with suppress(ValidationError):
        before = parse_value(Config.model_validate(before).to_yaml())
    changed = sorted(k for k, v in _flat(now).items() if _flat(before).get(k) != v)
    changed += sorted(set(_flat(before)) - set(_flat(now)))
    if changed:
        raise ValueError(
            f"{folder} holds a run with other settings ({', '.join(changed[:5])} changed). "
            "Choose another --output for a new run, or repeat the command with its settings to go on with it; "
            "`redistill train` also goes on under new ones with --resume."
        )


def _flat(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {key: leaf for k, v in tree.items() for key, leaf in _flat(v, f"{prefix}.{k}".lstrip(".")).items()}
