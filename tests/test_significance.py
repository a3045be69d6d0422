"""Whether the bootstrap covers what it says, Holm by hand, and the factor that is missing."""

import time

import numpy as np
import pytest

from redistill.evaluation.significance import Comparison, holm, needed, paired_bootstrap


def simulated(rng, seeds, prompts, *, shift=0.0, seed_std=0.0, prompt_std=1.0, rest_std=1.0):
    """Per-prompt scores of two methods whose true difference is `shift`, prompts of very unequal difficulty."""
    base = 20 + 10 * rng.normal(size=prompts)
    difference = (
        shift
        + seed_std * rng.normal(size=(seeds, 1))
        + prompt_std * rng.normal(size=prompts)
        + rest_std * rng.normal(size=(seeds, prompts))
    )
    return base + difference, np.broadcast_to(base, (seeds, prompts))


@pytest.mark.parametrize(("seeds", "seed_std"), [(1, 0.0), (10, 0.3)])
def test_the_interval_covers_the_truth_and_p_is_about_uniform(seeds, seed_std):
    rng = np.random.default_rng(5)
    found = [
        paired_bootstrap(
            *simulated(rng, seeds, 80, shift=0.4, seed_std=seed_std, rest_std=0.3), resamples=400, seed=run
        )
        for run in range(400)
    ]
    assert 0.92 <= np.mean([each.low <= 0.4 <= each.high for each in found]) <= 0.98
    null = [
        paired_bootstrap(
            *simulated(rng, seeds, 80, seed_std=seed_std, rest_std=0.3), resamples=400, seed=run
        ).p_value
        for run in range(400)
    ]
    # Within what 400 draws of a uniform one differ by: 5 standard errors, and a little for seeds drawn from ten.
    for level in (0.1, 0.25, 0.5, 0.75):
        assert np.mean(np.array(null) <= level) == pytest.approx(level, abs=0.1)


def test_two_seeds_are_too_bold_where_seeds_differ_and_careful_where_answers_do():
    rng = np.random.default_rng(6)

    def rejected(**parts):
        made = (simulated(rng, 2, 60, **parts) for _ in range(300))
        return np.mean([paired_bootstrap(*each, resamples=300).p_value <= 0.05 for each in made])

    assert rejected(seed_std=1.0, prompt_std=0.0, rest_std=0.01) == pytest.approx(0.5, abs=0.1)
    assert rejected(prompt_std=0.0, rest_std=1.0) < 0.03


def test_what_differs_is_found_and_what_does_not_is_not():
    rng = np.random.default_rng(7)
    a, b = simulated(rng, 3, 300, shift=1.0)
    found = paired_bootstrap(a, b)
    assert found.difference == pytest.approx(float((a - b).mean()))
    assert 0.5 < found.low < found.difference < found.high < 1.5 and found.p_value < 0.01
    back = paired_bootstrap(b, a)
    assert (back.difference, back.p_value) == pytest.approx((-found.difference, found.p_value), abs=1e-3)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low), abs=0.05)
    assert paired_bootstrap(a, b) == found and paired_bootstrap(a, b, seed=1) != found
    # Unpaired, the difficulty of the prompts would drown it.
    assert np.std(b.mean(axis=0)) > 5
    same = paired_bootstrap(a, a)
    assert (same.difference, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert needed(same) == (None, None)
    assert paired_bootstrap([[3.0]], [[1.0]]).difference == 2.0
    assert paired_bootstrap([1.0, 2.0], [1.0, 1.0]) == paired_bootstrap([[1.0, 2.0]], [[1.0, 1.0]])


def test_the_parts_of_the_variance_are_those_of_the_simulation():
    rng = np.random.default_rng(8)
    parts = [
        paired_bootstrap(*simulated(rng, 20, 200, seed_std=0.5, prompt_std=1.0, rest_std=2.0), resamples=1)
        for _ in range(30)
    ]
    assert np.mean([each.from_seeds for each in parts]) == pytest.approx(0.25 / 20, rel=0.3)
    assert np.mean([each.from_prompts for each in parts]) == pytest.approx(1 / 200, rel=0.2)
    assert np.mean([each.from_both for each in parts]) == pytest.approx(4 / 4000, rel=0.1)


def test_what_is_needed_tells_the_difference_once_it_is_had():
    one = Comparison(0.5, -0.5, 1.5, 0.3, 1, 100, None, 0.25, 0.0)
    assert needed(one) == (pytest.approx(0.25 * (2.801585 / 0.5) ** 2), None)  # 7.85: 785 prompts
    assert needed(one, 20) == (pytest.approx(0.25 * ((3.023341 + 0.841621) / 0.5) ** 2), None)  # at 0.25 %
    both = Comparison(0.5, -0.5, 1.5, 0.3, 2, 100, 0.02, 0.2, 0.01)
    target = (0.5 / 2.801585) ** 2
    assert needed(both) == (
        pytest.approx(0.21 / (target - 0.02)),
        None,
    )  # prompts alone keep it over the target
    rng = np.random.default_rng(9)
    prompts = round(
        100 * 4.0 / 100 / (0.3 / 2.801585) ** 2
    )  # what the formula says for a std of 2 and 0.3 to tell
    told = [
        paired_bootstrap(*simulated(rng, 1, prompts, shift=0.3, prompt_std=2.0, rest_std=0.0), resamples=300)
        for _ in range(300)
    ]
    assert np.mean([each.p_value <= 0.05 for each in told]) == pytest.approx(0.8, abs=0.08)
    assert np.mean([needed(each).prompts <= 1 for each in told]) == pytest.approx(0.5, abs=0.1)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
    with pytest.raises(ValueError, match="p-values"):
        holm([0.2, float("nan")])


def test_what_cannot_be_compared_is_said():
    for a, b, word in (
        ([[1.0, 2.0]], [[1.0, 2.0, 3.0]], "shape"),
        ([[1.0, float("nan")]], [[1.0, 2.0]], "finite"),
        ([[]], [[]], "no scores"),
    ):
        with pytest.raises(ValueError, match=word):
            paired_bootstrap(a, b)
    with pytest.raises(ValueError, match="resamples"):
        paired_bootstrap([1.0], [1.0], resamples=0)


def test_five_hundred_prompts_and_two_seeds_take_under_a_second():
    rng = np.random.default_rng(10)
    a, b = simulated(rng, 2, 500)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        paired_bootstrap(a, b)
        times.append(time.perf_counter() - started)
    assert min(times) < 1.0
