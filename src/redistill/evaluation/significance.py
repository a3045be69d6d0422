"""Whether one row of a table beats another: paired two-level bootstrap, Holm's correction, and what is missing.

Plain arithmetic on per-prompt scores; no model, no text, no file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Scores = npt.ArrayLike
"""[training seeds, prompts], or [prompts] for a single training seed."""

# How likely a real difference is told.
_POWER = 0.8
_PLACES_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Comparison:
    """`a` less `b` on the same prompts and the same training seeds.

    difference: the mean over seeds and prompts, in the unit of the scores. low, high: its interval.
    p_value: two-sided, 1 where nothing differs and for a single prompt, never under 2 / (resamples + 1).
    seeds, prompts: how many of each. from_seeds, from_prompts, from_both: what of the variance of
    `difference` falls with more training seeds, with more prompts, and with either; with one seed the first
    cannot be seen and is None, and all that is seen falls with prompts.
    """

    difference: float
    low: float
    high: float
    p_value: float
    seeds: int
    prompts: int
    from_seeds: float | None
    from_prompts: float
    from_both: float


class Needed(NamedTuple):
    """By which factor prompts alone, or training seeds alone, would have to grow; at most 1 means there are
    enough, None that no number of them would do (or, for seeds, that one seed cannot tell)."""

    prompts: float | None
    seeds: float | None


def paired_bootstrap(
    a: Scores, b: Scores, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Comparison:
    """Percentile bootstrap of mean(a - b) over training seeds and prompts (Efron, 1979; for the crossed
    design the pigeonhole bootstrap of Owen, 2007).

    a, b: [training seeds, prompts], each prompt's score already averaged over the sampling seeds. Both levels
    are drawn anew with replacement, each seed with all of its prompts; with one training seed only prompts.
    p_value = 2 min(share of draws <= 0, share of draws >= 0), at most 1, each share counted with one draw more.
    seed: of the draws; the same gives the same numbers.

    How far it holds. For d[s, n] = m + u[s] + v[n] + e[s, n] over S seeds, the variance drawn is (1 - 1/S) of
    what u gives to the mean, all of what v gives, and about (3 - 2/S) times what e gives. So it is careful
    where single answers scatter, and too bold where training seeds differ much and are few: with S = 2 and u
    alone, both seeds fall on one side of 0 half of the time, whatever the truth. True nulls rejected at 5 %
    (benchmarks/bootstrap_calibration.py): u alone 50 % at S = 2, 25 % at 3, 16 % at 5, 11 % at 10; e alone 1 %
    or less; u and e in equal parts 4, 2, 1 and 2 %; v alone 4 to 6 %. So look at `from_seeds` before
    believing a p-value from two seeds. To compare trained models instead of methods, average over the seeds
    first and give [prompts].
    Errors: ValueError for other shapes than each other's, no or non-finite scores, under 1 resample, a level
    outside (0, 1).
    """
    d = _differences(a, b)
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}: give 1 or more, 10,000 as a rule.")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: give a share between 0 and 1, like 0.95.")
    drawn = _draws(d, resamples, np.random.default_rng(seed))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    below, above = (1 + int(side.sum()) for side in (drawn <= 0, drawn >= 0))
    seeds, prompts = d.shape
    p_value = min(1.0, 2 * min(below, above) / (resamples + 1)) if prompts > 1 else 1.0
    return Comparison(float(d.mean()), float(low), float(high), p_value, seeds, prompts, *_variances(d))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of m comparisons, adjusted so that the chance of any false one stays under the level (Holm, 1979).

    The k-th smallest becomes max over j <= k of (m - j + 1) p_(j), at most 1; in the order given.
    Errors: ValueError for a value outside [0, 1].
    """
    if any(not 0 <= p <= 1 for p in p_values):
        raise ValueError(f"{list(p_values)} are no p-values: each must lie between 0 and 1.")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for done, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - done) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def needed(comparison: Comparison, tests: int = 1) -> Needed:
    """How much more of one kind would tell the observed difference from 0 at 5 %, two-sided, with 80 % power.

    tests: comparisons made at once; each then has to be told at 5 % / tests, the strictest of Holm's levels.
    Normal approximation: the variance of the difference must fall to T = (difference / (z + 0.842))^2, with z =
    1.960 for one test.
    Prompts times f leave from_seeds + (from_prompts + from_both) / f, so f = (from_prompts + from_both) /
    (T - from_seeds); likewise f = (from_seeds + from_both) / (T - from_prompts) for seeds. It takes the
    difference and the variances as they were observed: an order of magnitude, no more.
    """
    normal = NormalDist()
    reach = normal.inv_cdf(1 - 0.05 / (2 * tests)) + normal.inv_cdf(_POWER)
    target = (comparison.difference / reach) ** 2
    prompts = _factor(comparison.from_prompts + comparison.from_both, target - (comparison.from_seeds or 0.0))
    if comparison.from_seeds is None:
        return Needed(prompts, None)
    return Needed(
        prompts, _factor(comparison.from_seeds + comparison.from_both, target - comparison.from_prompts)
    )


def _factor(variance: float, room: float) -> float | None:
    return variance / room if room > 0 else None


def _differences(a: Scores, b: Scores) -> npt.NDArray[np.float64]:
    first, second = (np.atleast_2d(np.asarray(each, dtype=np.float64)) for each in (a, b))
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(
            f"scores of shape {first.shape} and {second.shape}: give both as [training seeds, prompts], on the "
            "same seeds and prompts."
        )
    d = first - second
    if d.size == 0:
        raise ValueError("there are no scores to compare: give at least one prompt.")
    if not np.isfinite(d).all():
        raise ValueError("a score is not a finite number: leave out what could not be measured in both.")
    return d


def _draws(
    d: npt.NDArray[np.float64], resamples: int, generator: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Means of `resamples` draws of rows and columns of `d`, some at a time for the sake of memory."""
    seeds, prompts = d.shape
    parts = []
    at_once = max(1, _PLACES_AT_ONCE // prompts)
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        rows = generator.integers(seeds, size=(count, seeds))
        columns = generator.integers(prompts, size=(count, prompts), dtype=np.int32)
        # The mean over the drawn seeds comes first: a draw's prompts are the same for all of its seeds.
        weight = np.stack([(rows == row).mean(axis=1) for row in range(seeds)], axis=1)
        parts.append(np.take_along_axis(weight @ d, columns, axis=1).mean(axis=1))
    return np.concatenate(parts)


def _variances(d: npt.NDArray[np.float64]) -> tuple[float | None, float, float]:
    """The three parts of the variance of the mean, from the mean squares of the two-way layout, none under 0."""
    seeds, prompts = d.shape
    over_prompts, over_seeds = d.mean(axis=1), d.mean(axis=0)
    by_prompt = float(over_seeds.var(ddof=1)) if prompts > 1 else math.nan
    if seeds == 1 or prompts == 1:
        by_seed = float(over_prompts.var(ddof=1)) / seeds if seeds > 1 else None
        return by_seed, by_prompt / prompts if prompts > 1 else 0.0, 0.0
    rest = d - over_prompts[:, None] - over_seeds[None, :] + d.mean()
    rest_square = float((rest**2).sum()) / ((seeds - 1) * (prompts - 1))
    by_seed = max(0.0, float(over_prompts.var(ddof=1)) - rest_square / prompts)
    by_prompt = max(0.0, by_prompt - rest_square / seeds)
    return by_seed / seeds, by_prompt / prompts, rest_square / (seeds * prompts)
