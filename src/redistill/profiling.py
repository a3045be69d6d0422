"""A few training steps taken apart: what each phase costs, beside what its arithmetic alone would.

The steps are done twice from one start: with time and memory measured, and with the arithmetic counted, which slows
them. At a learning rate of 0 the student stays as it is, so that the second run does the very work of the first.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from redistill.clock import Clock
from redistill.config import BudgetSettings, Config, EvaluationSettings
from redistill.meters import REST, Flops, PeakMemory, finished, matmul_rate
from redistill.prepare import Prepared, in_folder, prepare, trainer_of
from redistill.runlog import read

NOT_COUNTED = 1
# Something of each phase of a step.
Step = Mapping[str, float]
# What a step does not need: nothing is kept, validated or sent anywhere, and the student does not move.
QUIET = {
    "learning_rate": 0.0, "save_strategy": "no", "eval_strategy": "no", "eval_on_start": False,
    "load_best_model_at_end": False, "push_to_hub": False, "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """A phase of a step: medians over the steps that have it, and the highest of their peaks.

    steps: how many have it. peak_bytes: None where nobody tells. flops: of matrix products alone.
    """

    name: str
    steps: int
    seconds: float
    peak_bytes: int | None
    flops: int


@dataclass(frozen=True)
class Profile:
    """The phases of a step as they follow one another, and last what lies between them.

    device: kind of device. dtype: what the student computes in. matmul_rate: flops per second of a matrix product of
    that dtype. steps: how many were measured.
    """

    device: str
    dtype: str
    matmul_rate: float
    steps: int
    phases: tuple[Cost, ...]

    @property
    def whole(self) -> Cost:
        """A step that has every phase."""
        peaks = [each.peak_bytes for each in self.phases if each.peak_bytes is not None]
        return Cost(
            "sum",
            self.steps,
            sum(each.seconds for each in self.phases),
            max(peaks, default=None),
            sum(each.flops for each in self.phases),
        )

    def share(self, cost: Cost) -> float:
        """Of the seconds of `whole`, 0 to 1."""
        return cost.seconds / self.whole.seconds

    def floor(self, cost: Cost) -> float:
        """The seconds its matrix products would take at the rate of `matmul_rate`; 0 without any."""
        return cost.flops / self.matmul_rate

    def rate(self, cost: Cost) -> float | None:
        """Its flops per second; None without any."""
        return cost.flops / cost.seconds if cost.flops else None

    def slowest(self) -> Cost:
        """The phase with the most seconds beyond its floor."""
        return max(self.phases, key=lambda each: each.seconds - self.floor(each))

    def record(self) -> dict[str, Any]:
        """All of it as JSON values: `docs/run-folder.md` names the keys."""

        def line(cost: Cost) -> dict[str, Any]:
            rate = self.rate(cost)
            return {
                **asdict(cost),
                "share": self.share(cost),
                "flops_per_second": rate,
                "matmul_share": rate and rate / self.matmul_rate,
                "floor_seconds": self.floor(cost),
            }

        return {
            "device": self.device,
            "dtype": self.dtype,
            "matmul_flops_per_second": self.matmul_rate,
            "steps": self.steps,
            "phases": [line(each) for each in self.phases],
            "sum": line(self.whole),
        }


def profile(config: Config, steps: int = 3) -> Profile:
    """Measure `steps` training steps of `config` after one that is not counted, all from the first records of its
    data. Nothing is left on the disk.

    Raises what `prepare` and training raise.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = _quiet(config, folder, NOT_COUNTED + steps)
        prepared = prepare(config)
        device = prepared.student.device
        seconds, peaks = _steps(config, prepared, folder / "timed", lambda: PeakMemory(device))
        # Trainer and optimizer hold each other, and would lie beside the next.
        gc.collect()
        _, flops = _steps(config, prepared, folder / "counted", Flops)
    dtype = _compute_dtype(config, prepared)
    return Profile(
        device.type,
        str(dtype).removeprefix("torch."),
        matmul_rate(device, dtype),
        steps,
        _costs(seconds, peaks, flops),
    )


def _quiet(config: Config, folder: Path, steps: int) -> Config:
    """The recipe for a few steps, reading no more than they need and writing into `folder` only."""
    training = {**config.training, **QUIET, "max_steps": steps}
    batch = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)
    data = {
        "limit": min(config.data.limit or steps * batch, steps * batch),
        "eval_path": None,
        "eval_split": None,
        "responses_path": str(folder / "teacher-answers.jsonl"),
    }
    dac = config.objective.dac.model_copy(update={"learning_rate": 0.0})
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "objective": config.objective.model_copy(update={"dac": dac}),
            "budget": BudgetSettings(),
            "evaluation": EvaluationSettings(),
            "training": training,
        }
    )


def _steps(
    config: Config, prepared: Prepared, folder: Path, new_meter: Callable[[], PeakMemory | Flops]
) -> tuple[list[Step], list[Step]]:
    """The steps that count, trained in `folder` under a meter each: their seconds, and what the meters found."""
    meters: list[PeakMemory | Flops] = []

    def new_clock() -> Clock:
        meters.append(new_meter())
        return Clock(meters[-1], finished)

    trainer_of(in_folder(config, folder), prepared, new_clock=new_clock).train()
    seconds = [_phases(record) for record in read(folder / "steps.jsonl")]
    return seconds[NOT_COUNTED:], [meter.found for meter in meters[NOT_COUNTED:]]


def _phases(record: Mapping[str, Any]) -> Step:
    prefix = "seconds_"
    found = {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}
    return {**found, REST: record["seconds"] - sum(found.values())}


def _costs(seconds: Sequence[Step], peaks: Sequence[Step], flops: Sequence[Step]) -> tuple[Cost, ...]:
    # Not every step has every phase: the order is that of those which have the most.
    names = dict.fromkeys(name for step in sorted(seconds, key=len, reverse=True) for name in step)
    names = [*(name for name in names if name != REST), REST]

    def of(name: str, steps: Sequence[Step]) -> list[float]:
        return [step[name] for step in steps if name in step]

    return tuple(
        Cost(
            name,
            len(of(name, seconds)),
            statistics.median(of(name, seconds)),
            max(map(int, of(name, peaks)), default=None),
            round(statistics.median(of(name, flops) or [0])),
        )
        for name in names
    )


def _compute_dtype(config: Config, prepared: Prepared) -> torch.dtype:
    if config.training.get("bf16"):
        return torch.bfloat16
    return torch.float16 if config.training.get("fp16") else prepared.student.dtype
