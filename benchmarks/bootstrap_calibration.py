"""How often `paired_bootstrap` calls a difference that is none: `python benchmarks/bootstrap_calibration.py`.

True nulls rejected at 5 %, in percent of 600 simulations of 100 prompts, by the number of training seeds and by
where the variance of the mean difference comes from: training seeds (u), single answers (e), both in equal parts,
prompts (v).
"""

import numpy as np

from redistill.evaluation.significance import paired_bootstrap

SIMULATIONS, PROMPTS, SEEDS = 600, 100, (2, 3, 5, 10)


def rejected(seeds: int, u: float, e: float, v: float) -> float:
    """Percent of null differences d[s, n] = u[s] + e[s, n] + v[n] with a p-value of at most 0.05."""
    draw, hits = np.random.default_rng(seeds), 0
    for number in range(SIMULATIONS):
        answers = e * draw.normal(size=(seeds, PROMPTS))
        scores = answers + u * draw.normal(size=(seeds, 1)) + v * draw.normal(size=PROMPTS)
        hits += paired_bootstrap(scores, np.zeros_like(scores), resamples=1000, seed=number).p_value <= 0.05
    return 100 * hits / SIMULATIONS


if __name__ == "__main__":
    print("seeds", *SEEDS, sep="\t")
    equal = PROMPTS**-0.5  # u[s] is averaged over seeds only, e[s, n] over prompts too
    for name, parts in {"u": (1, 0, 0), "e": (0, 1, 0), "u and e": (equal, 1, 0), "v": (0, 0, 1)}.items():
        print(name, *(f"{rejected(seeds, *parts):.1f}" for seeds in SEEDS), sep="\t")
