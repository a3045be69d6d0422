"""What `redistill compare` is asked to do: the file it reads, and the runs that follow from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from redistill.compare.search import FIXED, TRIAL_SEED, CompareSearch, Point
from redistill.config import Config, ConfigError, load_config
from redistill.config_faults import faults, listed
from redistill.measure import Request, load_sets
from redistill.methods import Method, find_method, read_methods
from redistill.settings import Count, DType, Index, Positive, Settings, Text
from redistill.splits import heldout_of
from redistill.yaml_lines import YamlError, read_yaml

SHARED = ("data.template", "data.system", "data.max_prompt_length")
"""What says how prompts are written, beside student and teacher."""

Seeds = Annotated[tuple[Index, ...], Field(strict=False, min_length=1)]


class CompareBudget(Settings):
    """What every run may spend; one of the three."""

    steps: Count | None = None
    """Optimizer steps."""
    student_tokens: Count | None = None
    """Response tokens that the student is trained on."""
    seconds: Positive | None = None
    """Seconds of training, rollouts included."""


class CompareEvaluation(Settings):
    """What every model is asked."""

    sets: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Names of evaluation sets (dolly, self_instruct, vicuna, sinst, uinst, uinst_short)."""
    data_root: str = ""
    """Folder in which they lie."""
    path: Text | None = None
    """A data set of your own in their place."""
    split: Text = "test"
    """Its split."""
    seeds: Seeds = (10, 20, 30, 40, 50)
    """One full set of sampled answers each. MiniLLM's."""
    temperature: Positive = 1.0
    """Of the sampled answers. MiniLLM's 1, at which ROUGE-L also rewards a student for being narrow."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of the sampled answers. MiniLLM's 1."""
    greedy: bool = True
    """Answer greedily too; the papers do not."""
    max_prompt_length: Count | None = None
    """Longest prompt, in tokens; longer ones are cut. null: the recipe's data.max_prompt_length."""
    max_new_tokens: Count = 256
    """Longest answer. MiniLLM's 512 less a prompt of 256."""
    batch_size: Count = 32
    """Prompts answered at once."""
    limit: Count | None = None
    """Only the first so many records; null: all."""
    exposure_prompts: Index = 0
    """On how many prompts excess accumulated error is measured; 0: on none."""
    dtype: DType | None = None
    """Number format in which students, start and teacher are measured; null: the recipe's student.dtype."""


class CompareJudge(Settings):
    """A model that compares every method's answers with the baseline's, see `redistill judge`."""

    model: Text
    """Hub id or folder."""
    dtype: DType | Literal["auto"] = "auto"
    """Its number format; auto: that of its files."""
    limit: Count | None = None
    """Only the first so many prompts of each set; null: all."""
    batch_size: Count = 8
    """Pairs judged at once."""


class Comparison(Settings):
    """One comparison: methods on one pair, under one budget, from one start."""

    recipe: Text
    """Recipe with teacher, student (the common start), data and training; seen from this file's folder."""
    methods: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
    """Names from methods.yaml, or from `define`."""
    define: dict[str, Any] = Field(default_factory=dict)
    """Rows of your own, in the form of methods.yaml."""
    budget: CompareBudget
    seeds: Seeds = (1, 2)
    """One run of every method each."""
    baseline: Text | None = None
    """The method that the others are compared with; null: the first."""
    evaluation: CompareEvaluation = CompareEvaluation()
    judge: CompareJudge | None = None
    """A judge of the answers; null: none."""
    search: CompareSearch | None = None
    """Settings that are tried before; null: every method runs as it stands."""
    jobs: Count = 1
    """Runs at once; the command line's --jobs wins."""


@dataclass(frozen=True)
class Plan:
    """A comparison read and checked. recipe: the path of the recipe."""

    comparison: Comparison
    recipe: Path
    methods: Mapping[str, Method]

    def warnings(self) -> list[str]:
        """Sentences about what is allowed but must be known when the table is read."""
        if self.comparison.budget.seconds is not None and self.comparison.jobs > 1:
            return [
                f"the budget is in seconds and {self.comparison.jobs} runs share the machine: they compare only with "
                "runs that had as many neighbours, so keep to one number of jobs in this output folder."
            ]
        return []

    @property
    def baseline(self) -> str:
        """The method that the others are compared with."""
        return self.comparison.baseline or self.comparison.methods[0]

    def overrides(self, method: str, seed: int, settings: Point) -> list[str]:
        """What makes the recipe the run of `method` with `seed`: the method's settings, `settings` over them, the
        budget, the seed."""
        budget = self.comparison.budget
        settings = {**self.methods[method].settings, **settings, "training.seed": seed}
        if budget.steps is not None:
            settings |= {
                "training.max_steps": budget.steps,
                "budget.student_tokens": None,
                "budget.seconds": None,
            }
        else:
            settings |= {"budget.student_tokens": budget.student_tokens, "budget.seconds": budget.seconds}
        return [f"{name}={json.dumps(value)}" for name, value in settings.items()]

    def config(self, method: str, seed: int, settings: Point = MappingProxyType({})) -> Config:
        """The whole configuration of one run. settings: laid over those of the method."""
        return load_config(self.recipe, self.overrides(method, seed, settings))

    @property
    def teacher(self) -> str:
        """Id or folder."""
        return self.common.teacher.model_name_or_path

    @property
    def request(self) -> Request:
        """How every model is measured: as the comparison asks, with prompts written as the recipe writes them."""
        asked, config = self.comparison.evaluation, self.common
        return Request(
            data=asked.path or "",
            split=asked.split,
            sets=asked.sets,
            data_root=asked.data_root,
            seeds=asked.seeds,
            temperature=asked.temperature,
            top_p=asked.top_p,
            greedy=asked.greedy,
            template=config.data.template,
            max_prompt_length=asked.max_prompt_length or config.data.max_prompt_length,
            max_new_tokens=asked.max_new_tokens,
            batch_size=asked.batch_size,
            limit=asked.limit,
            exposure_prompts=asked.exposure_prompts,
            dtype=asked.dtype or config.student.dtype,
            system=config.data.system,
        )

    @property
    def validation(self) -> Request:
        """How a trial of the search is measured: on the recipe's held-out data.

        Raises ConfigError where there is none.
        """
        data, search = self.common.data, self.comparison.search
        heldout = heldout_of(data)
        if heldout is None:
            raise ConfigError(
                f"{self.recipe}: a search chooses on held-out data: set data.eval_path or data.eval_split."
            )
        return replace(
            self.request,
            data=heldout[0],
            data_name=data.name,
            split=heldout[1],
            limit=data.eval_limit,
            sets=(),
            seeds=(),
            max_prompt_length=data.max_prompt_length,
            greedy=search is not None and search.by == "rougeL",
            exposure_prompts=0,
        )

    @property
    def common(self) -> Config:
        """A run's configuration, of which what no method changes is read."""
        return self.config(self.comparison.methods[0], self.comparison.seeds[0])


def read_plan(path: Path, jobs: int | None = None) -> Plan:
    """The comparison in the YAML file `path`, with every run's recipe checked before any of them begins.

    jobs: in place of the file's; None leaves that.
    Raises ConfigError (a ValueError) naming file, setting and what is wrong.
    """
    try:
        values, lines = read_yaml(path)
    except YamlError as error:
        raise ConfigError(str(error)) from None
    if jobs is not None:
        values["jobs"] = jobs
    try:
        comparison = Comparison.model_validate(values)
    except ValidationError as error:
        origins = {key: f"{path}:{line}" for key, line in lines.items()}
        raise ConfigError(listed([*faults(error, Comparison, origins, str(path))])) from None
    table = read_methods(comparison.define)
    plan = Plan(
        comparison, path.parent / comparison.recipe, {n: find_method(n, table) for n in comparison.methods}
    )
    _check(plan, path)
    search = comparison.search
    for method in comparison.methods:
        for point in search.draw(method) if search else [{}]:
            plan.config(method, comparison.seeds[0], point)
    if search:
        _check_heldout(plan, path)
    return plan


def _check(plan: Plan, path: Path) -> None:
    asked, budget = plan.comparison, plan.comparison.budget
    given = [name for name in type(budget).model_fields if getattr(budget, name) is not None]
    if len(given) != 1:
        raise ConfigError(f"{path}: budget needs one of steps, student_tokens and seconds, not {len(given)}.")
    if bool(asked.evaluation.sets) == bool(asked.evaluation.path):
        raise ConfigError(f"{path}: evaluation needs sets or path, one of the two.")
    if plan.baseline not in asked.methods:
        raise ConfigError(f"{path}: the baseline {plan.baseline} is none of the methods.")
    lists = {
        "methods": asked.methods,
        "seeds": asked.seeds,
        "evaluation.sets": asked.evaluation.sets,
        "evaluation.seeds": asked.evaluation.seeds,
    }
    for name, values in lists.items():
        if len(set(values)) != len(values):
            raise ConfigError(f"{path}: {name} names one twice.")
    for name, method in plan.methods.items():
        if name in ("teacher", "start"):
            raise ConfigError(
                f"{path}: the table has a row {name} of its own: give your method another name."
            )
        for setting in method.settings:
            if _shared(setting):
                raise ConfigError(
                    f"{path}: {name} sets {setting}, which all methods share: set it in the recipe."
                )
    for fault in asked.search.faults(asked.methods) if asked.search else ():
        raise ConfigError(f"{path}: {fault}")
    if asked.search and TRIAL_SEED in asked.seeds:
        raise ConfigError(f"{path}: the seed {TRIAL_SEED} is that of the search's trials: choose another.")


def _shared(setting: str) -> bool:
    """Whether what is trained from, learnt from or asked hangs on it, or whether the comparison itself sets it."""
    if setting.startswith(("student.", "teacher.")):
        return not setting.startswith("student.lora")
    return setting in SHARED or setting in FIXED or setting.startswith("budget.")


def _check_heldout(plan: Plan, path: Path) -> None:
    """What settings are chosen on must not be what the table is made of."""
    (heldout,) = load_sets(plan.validation)
    seen = {(example.prompt, example.context) for example in heldout.examples}
    for asked in load_sets(plan.request):
        shared = sum((example.prompt, example.context) in seen for example in asked.examples)
        if 2 * shared > len(asked.examples):
            raise ConfigError(
                f"{path}: {shared} of {len(asked.examples)} evaluation prompts ({asked.source}) are in the held-out "
                f"data that the search chooses on ({heldout.source}): choose other data for one of them."
            )
