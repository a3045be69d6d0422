"""Tasks of lm-evaluation-harness on a checkpoint, for `redistill evaluate MODEL --tasks arc_easy,hellaswag`.

The harness (the extra `lm-eval`, imported nowhere else) brings the tasks, their prompts and their metrics, and
reads the model through its own forward. Here are only the way in, its sentences for users, and the records out.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redistill.loading import first_line, load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHOTS_SEED = 1234  # the harness's own, so that the same examples are shown
_RESAMPLES = 1000  # for the standard error of metrics that have no formula for it


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, or of a group of tasks where its author says how to put them together.

    version: the task's own, as text; None where it has none. metric: as the harness names it ("acc",
    "acc_norm"), with a comma and the filter behind it where the task filters the answers. value: in the
    metric's unit, for accuracies 0 to 1. stderr: standard error over the records; None where there is none.
    samples: records scored. shots: solved examples shown before each; None for a group that has no one number.
    """

    task: str
    version: str | None
    metric: str
    value: float
    stderr: float | None
    samples: int
    shots: int | None


def run_tasks(
    name: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None,
    batch_size: int,
    device: str,
    dtype: str,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
) -> list[TaskScore]:
    """`score_tasks` for the checkpoint in a folder or on the hub (an adapter is merged into its base).

    device: as torch names it. dtype: see `load_model`. The names of the tasks are checked before the model is
    loaded. Errors: those of `score_tasks`, `load_model` and `load_tokenizer`; ValueError for no such device.
    """
    manager = _manager(tasks, include_path, limit, batch_size)
    tokenizer = load_tokenizer(name)
    model: Any = load_model(name, dtype=dtype)
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as problem:
        raise ValueError(f"the device {device!r} cannot be used: {first_line(problem)}") from problem
    return _scored(manager, model, tokenizer, tasks, limit, batch_size, num_fewshot)


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None,
    batch_size: int,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
) -> list[TaskScore]:
    """What lm-evaluation-harness measures on `tasks` with `model` as it is, on the device where it is.

    tasks: names of tasks, groups or tags of the harness, or of task files in `include_path`, a folder. A task
        file can name Python functions beside it, which are run: use folders that you trust. A few tasks of the
        harness itself fetch their metric as code from the hub (through the package `evaluate`).
    limit: most records of each task, the first ones; None takes all, and only that is worth a comparison.
    num_fewshot: solved examples before each record; None is the task's own number. A task that says 0 keeps it.
    Prompts are plain text, as in published tables: no chat template. The same call gives the same numbers;
    random states are left as found, the model in evaluation mode. Gradients are not touched.
    Errors: ValueError without the extra, for an unknown name, for data that cannot be had, for a task that
    runs code the model wrote.
    """
    manager = _manager(tasks, include_path, limit, batch_size)
    return _scored(manager, model, tokenizer, tasks, limit, batch_size, num_fewshot)


def _manager(
    tasks: Sequence[str], include_path: str | Path | None, limit: int | None, batch_size: int
) -> Any:
    """The harness's register of tasks, in which every name of `tasks` was found."""
    if find_spec("lm_eval") is None:
        raise ValueError(
            '--tasks needs lm-evaluation-harness: install it with pip install "redistill[lm-eval]".'
        )
    if not tasks:
        raise ValueError("no task is named: give one or more, such as --tasks arc_easy,hellaswag.")
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: give 1 or more.")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"there is no folder {str(include_path)!r}: give the folder of your task files.")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    known = set(manager.all_tasks)
    for name in tasks:
        if name not in known:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise ValueError(
                f"lm-evaluation-harness has no task {name!r}: "
                + (f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them.")
            )
    return manager


def _scored(
    manager: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None,
    batch_size: int,
    num_fewshot: int | None,
) -> list[TaskScore]:
    from lm_eval.evaluator import evaluate

    wanted = list(dict.fromkeys(tasks))
    with _own_random_numbers():
        loaded = _loaded(manager, wanted)
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (own != 0 and num_fewshot is not None):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
            task.set_fewshot_seed(seed=SHOTS_SEED)
        try:
            results = evaluate(
                _wrapped(model, tokenizer, batch_size),
                loaded,
                limit=limit,
                bootstrap_iters=_RESAMPLES,
                log_samples=False,
            )
        except ValueError as problem:
            raise ValueError(f"{', '.join(wanted)}: {first_line(problem)}") from problem
    assert results is not None, "one process has all results"
    return list(_records(results))


def _loaded(manager: Any, wanted: list[str]) -> Any:
    from datasets.exceptions import DatasetsError

    try:
        return manager.load(wanted)
    except (OSError, DatasetsError) as problem:
        raise ValueError(
            f"the data of {', '.join(wanted)} cannot be had: {first_line(problem)} Fetch it once with a "
            "connection, or give --include-path with a task file over a file of yours."
        ) from problem
    except (ValueError, LookupError, RuntimeError, ImportError) as problem:
        raise ValueError(f"{', '.join(wanted)} cannot be loaded: {first_line(problem)}") from problem


def _wrapped(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    # It warns that options for loading are ignored for a model that is loaded already: there are none.
    voice = logging.getLogger("lm_eval.models.huggingface")
    level = voice.level
    voice.setLevel(logging.ERROR)
    # Its decorator hides the parameters from a type checker.
    wrapper: Any = HFLM
    try:
        return wrapper(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    finally:
        voice.setLevel(level)


@contextlib.contextmanager
def _own_random_numbers() -> Iterator[None]:
    """The seeds with which the harness's own command starts, and afterwards the states from before.

    Tasks draw from the global generators (shuffled choices, sampled answers).
    """
    import numpy as np
    import torch

    plain, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(0)
        np.random.seed(SHOTS_SEED)
        torch.manual_seed(SHOTS_SEED)
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(array)


def _records(results: Any) -> Iterator[TaskScore]:
    for name, found in results["results"].items():
        version = results["versions"].get(name)
        for key, value in found.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            yield TaskScore(
                task=name,
                version=None if version is None else str(version),
                metric=metric if filtered == "none" else key,
                value=float(value),
                stderr=_number(found.get(f"{metric}_stderr,{filtered}")),
                samples=int(found["sample_len"]),
                shots=results["n-shot"].get(name),
            )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
