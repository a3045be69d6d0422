"""What a fair search tries: every method as many settings, drawn from its grid."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from redistill.settings import Count, Index, Settings

Values = Annotated[tuple[Any, ...], Field(strict=False, min_length=1)]
Point = Mapping[str, Any]

TRIAL_SEED = 1000
"""Training seed of every trial; the comparison's own seeds must be others."""
SEARCHED = ("rollout", "revision", "objective", "training")
"""Sections whose settings can be searched: the others say what is compared, and on what."""
FIXED = ("training.seed", "training.max_steps", "training.num_train_epochs", "training.output_dir")


class CompareSearch(Settings):
    """Which settings are tried before the comparison, and by what they are chosen."""

    trials: Count
    """Trials of each method, under the comparison's budget; a smaller grid is tried whole."""
    seed: Index = 0
    """Of the draw."""
    settings: dict[str, Values] = Field(default_factory=dict)
    """section.setting: the values to try, for all methods."""
    own: dict[str, dict[str, Values]] = Field(default_factory=dict)
    """method: further settings, or other values of one above. The number of trials stays the same."""
    by: Literal["kl", "rougeL"] = "kl"
    """Measured on the recipe's held-out data: KL(teacher || student) per token of the references, or ROUGE-L of
    greedy answers."""

    def grid(self, method: str) -> dict[str, tuple[Any, ...]]:
        """The values of every setting that `method` tries."""
        return {**self.settings, **self.own.get(method, {})}

    def draw(self, method: str) -> list[Point]:
        """The points that `method` tries, in order: without repetition, all of a grid of no more than `trials`.

        Methods with equal grids get equal points in equal order.
        """
        grid = self.grid(method)
        size = self.size(method)
        places = random.Random(self.seed).sample(range(size), min(self.trials, size))
        return [_point(grid, place) for place in places]

    def size(self, method: str) -> int:
        """The number of points in the grid of `method`."""
        return math.prod(len(values) for values in self.grid(method).values())

    def faults(self, methods: tuple[str, ...]) -> list[str]:
        """What is wrong with it in a comparison of `methods`."""
        found = []
        if not self.settings and not any(self.own.values()):
            found.append("search needs settings, as training.learning_rate: [1e-4, 1e-3].")
        found += [
            f"search.own.{name}: {name} is none of the methods." for name in self.own if name not in methods
        ]
        for grid in (self.settings, *self.own.values()):
            for name, values in grid.items():
                if name.partition(".")[0] not in SEARCHED or name in FIXED:
                    found.append(
                        f"search cannot try {name}: it tries settings of {', '.join(SEARCHED)}, and the comparison "
                        "itself sets seed and length of a run."
                    )
                if len({json.dumps(value) for value in values}) < len(values):
                    found.append(f"search names a value of {name} twice.")
        return found


def _point(grid: Mapping[str, tuple[Any, ...]], place: int) -> Point:
    """The point at `place`, the last setting changing fastest."""
    point = {}
    for name, values in reversed(list(grid.items())):
        place, at = divmod(place, len(values))
        point[name] = values[at]
    return {name: point[name] for name in grid}


def shown(point: Point) -> str:
    """A point as text: "training.learning_rate=0.001, revision.rounds=3"."""
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in point.items())


@dataclass(frozen=True)
class Trial:
    """One point as it was tried. value: what is chosen by; None for one that failed or is not finite."""

    settings: Point
    value: float | None
    failed: str = ""


@dataclass(frozen=True)
class Found:
    """The search of one method. grid: points there were. best: the place of the best trial; None: all were bad."""

    grid: int
    trials: tuple[Trial, ...]
    best: int | None

    @property
    def settings(self) -> Point:
        """Those of the best trial; none where there is none."""
        return {} if self.best is None else self.trials[self.best].settings
