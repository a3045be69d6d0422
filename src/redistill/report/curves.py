"""The records of steps as curves: one column per key, thinned to what a screen can show without losing a peak."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from redistill.report.plain import short

NOT_DRAWN = ("step", "progress")
PHASE = "seconds_"


class Panel(NamedTuple):
    """One chart. keys: of steps.jsonl, and how each is called. points: the same of evaluations.jsonl.
    about: one sentence for who has not read the paper. share: from 0 to 1."""

    title: str
    unit: str
    about: str
    keys: Mapping[str, str]
    points: Mapping[str, str] = {}
    share: bool = False


PANELS = (
    Panel(
        "Loss",
        "nats",
        "What the student minimised: the weighted terms of a step.",
        {"loss": "loss"},
    ),
    Panel(
        "KL to the teacher",
        "nats per token",
        "How far the student's distributions are from the teacher's.",
        {"kl": "in training"},
        {"eval_kl": "held out"},
    ),
    Panel(
        "Terms of the loss",
        "before their weights",
        "Cross-entropy on the references, the token loss, the span loss, the policy gradient.",
        {"sft": "SFT", "token": "token", "span": "span", "policy": "policy"},
    ),
    Panel(
        "Teacher's log-likelihood",
        "nats per token",
        "How likely the teacher finds the tokens that are distilled on.",
        {"teacher_log_likelihood": "teacher"},
    ),
    Panel(
        "Revised and agreed",
        "share of fresh answers",
        "Revised by SCRG, agreed with by the teacher at every token, ended by the length limit.",
        {"share_revised": "revised", "share_agreed": "agreed", "share_cut": "cut"},
        share=True,
    ),
    Panel(
        "Position of the error",
        "share of the answer",
        "Where the last correction was made: 0 is the first token of the answer.",
        {"error_position": "mean place"},
        share=True,
    ),
    Panel(
        "Gain by revision",
        "nats per token",
        "Rise of the teacher's log-likelihood from the first writing to the answer trained on.",
        {"teacher_gain": "gain"},
    ),
    Panel(
        "KL at the error",
        "nats",
        "Before and after the correction: equal up to rounding, as what stands before is kept.",
        {"kl_at_error_before": "before", "kl_at_error_after": "after"},
    ),
    Panel(
        "Clip levels u and l",
        "quantile",
        "What DAC-KL keeps of the teacher's distribution lies between the lower and the upper level.",
        {"upper": "u, upper", "lower": "l, lower"},
        share=True,
    ),
    Panel(
        "Retained mass",
        "share",
        "Teacher's probability inside the clip; the rest is one bucket.",
        {"retained_mass": "mass"},
        share=True,
    ),
    Panel(
        "Retained classes",
        "classes",
        "How many classes lie inside the clip.",
        {"retained_classes": "classes"},
    ),
    Panel(
        "Variety",
        "distinct pairs",
        "Share of different token pairs in a revised answer, first writing and final.",
        {"distinct_2_before": "before", "distinct_2_after": "after"},
        share=True,
    ),
    Panel(
        "Perplexity, held out",
        "",
        "exp of the mean negative log-likelihood of references.",
        {},
        {"eval_perplexity": "held out"},
    ),
    Panel(
        "Loss, held out",
        "nats per token",
        "What the adaptive schedule follows.",
        {},
        {"eval_loss": "held out"},
    ),
    Panel(
        "Share of student answers",
        "probability",
        "How likely an answer of the student takes the place of a reference.",
        {"lmbda": "share"},
        share=True,
    ),
    Panel(
        "Answers",
        "per step",
        "Places of a step with the student's answer, and those from the replay buffer.",
        {"student_samples": "student's", "replayed": "replayed"},
    ),
    Panel("Replay buffer", "answers", "How many earlier answers are kept.", {"buffer": "kept"}),
    Panel(
        "Speed",
        "tokens per second",
        "Tokens trained on, by the seconds of the step.",
        {"tokens_per_second": "tokens"},
    ),
    Panel(
        "Size of a step",
        "per step",
        "Tokens that are fitted and distilled on, and phrases of the span loss.",
        {
            "sft_tokens": "fitted",
            "distilled_tokens": "distilled",
            "student_tokens": "read",
            "spans": "phrases",
        },
    ),
    Panel(
        "Steps left out", "steps", "Steps that were not finite and updated nothing.", {"skipped": "skipped"}
    ),
)


class Columns:
    """The numbers of a file's records, key by key; a record without a key is a gap."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._columns: dict[str, array[float]] = {}
        self._lost: dict[str, int] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """One more record; without a whole number under `step` it counts as the next."""
        place, step = len(self.steps), record.get("step")
        self.steps.append(step if type(step) is int else place + 1)
        for key, value in record.items():
            if type(value) is not float and type(value) is not int:
                continue
            column = self._columns.get(key)
            if column is None:
                column = self._columns[key] = array("d")
            if len(column) < place:
                column.extend([math.nan] * (place - len(column)))
            column.append(value)
            if not math.isfinite(value):
                self._lost[key] = self._lost.get(key, 0) + 1

    @property
    def names(self) -> list[str]:
        """The keys of whatever was a number."""
        return list(self._columns)

    def last(self, key: str) -> float | None:
        """The newest number under `key`."""
        found = [value for value in self._columns.get(key, ()) if math.isfinite(value)]
        return found[-1] if found else None

    def total(self, key: str) -> float:
        """The sum of what is finite."""
        return math.fsum(value for value in self._columns.get(key, ()) if math.isfinite(value))

    def mean(self, key: str, start: int, stop: int | None = None) -> float | None:
        """The mean over some of the records, counted from the first or, below 0, from the last."""
        found = [value for value in self.whole(key)[start:stop] if math.isfinite(value)]
        return math.fsum(found) / len(found) if found else None

    def whole(self, key: str) -> list[float]:
        """The column with a place for every record, NaN in the gaps."""
        column = self._columns.get(key, ())
        return [*column, *[math.nan] * (len(self.steps) - len(column))]

    @property
    def lost(self) -> dict[str, int]:
        """How many values of a key are not finite."""
        return dict(self._lost)

    def pieces(self, key: str, cuts: Sequence[int]) -> list[list[float]]:
        """What is finite under `key` between each two places of `cuts`."""
        column = self._columns.get(key, ())
        return [
            [value for value in column[start:stop] if math.isfinite(value)]
            for start, stop in zip(cuts, cuts[1:], strict=False)
        ]


def curves(runs: Sequence[Columns], most: int) -> dict[str, Any]:
    """The curves of a run, or of several that are drawn as one: the seeds of a method.

    `x`, and under `y` each key's `mean` with, where several values share a point, `low` and `high`; `lost`: how many
    values of a key are not finite. None is a gap. At most `most` points.
    """
    # One run is cut record by record, whatever its steps are called; several meet at equal steps.
    steps = runs[0].steps if len(runs) == 1 else sorted({step for run in runs for step in run.steps})
    edges = _edges(len(steps), most)
    thinned = len(edges) - 1 < len(steps)
    x = [steps[(a + b) // 2] if thinned else steps[a] for a, b in zip(edges, edges[1:], strict=False)]
    cuts = (
        [edges]
        if len(runs) == 1
        else [_cuts(run.steps, [steps[edge] for edge in edges[:-1]]) for run in runs]
    )
    names = dict.fromkeys(key for run in runs for key in run.names if key not in NOT_DRAWN)
    y = {key: _summed([run.pieces(key, cut) for run, cut in zip(runs, cuts, strict=True)]) for key in names}
    lost = {key: sum(run.lost.get(key, 0) for run in runs) for run in runs for key in run.lost}
    return {"x": x, "y": y, "lost": lost, "steps": len(steps)}


def spent(runs: Sequence[Columns]) -> dict[str, Any]:
    """Seconds of all steps of a run, or of a method's runs on average: `whole`, and by `phases`."""
    names = dict.fromkeys(key for run in runs for key in run.names if key.startswith(PHASE))
    mean = {key: math.fsum(run.total(key) for run in runs) / len(runs) for key in ("seconds", *names)}
    phases = {name.removeprefix(PHASE): short(mean[name]) for name in names}
    return {"whole": short(mean["seconds"]), "phases": phases}


def _edges(count: int, most: int) -> list[int]:
    pieces = min(count, most)
    return [round(place * count / pieces) for place in range(pieces + 1)] if pieces else [0]


def _cuts(steps: Sequence[int], first: Sequence[int]) -> list[int]:
    """Where, in a run's `steps`, the points begin whose first steps are `first`; and its end."""
    return [*(bisect_left(steps, step) for step in first), len(steps)]


def _summed(pieces: Sequence[Sequence[Sequence[float]]]) -> dict[str, list[float | None]]:
    """pieces: of each run, of each point, the values."""
    mean: list[float | None] = []
    low: list[float | None] = []
    high: list[float | None] = []
    for of_runs in zip(*pieces, strict=True):
        known = [value for values in of_runs for value in values]
        mean.append(short(math.fsum(known) / len(known)) if known else None)
        low.append(short(min(known)) if known else None)
        high.append(short(max(known)) if known else None)
    return {"mean": mean} if low == high else {"mean": mean, "low": low, "high": high}
