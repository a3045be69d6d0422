"""What changed between two models that were asked the same: their kept scores, prompt by prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from redistill.evaluation.answers import prompt_scores
from redistill.evaluation.readings import reference_divergences
from redistill.evaluation.significance import holm, paired_bootstrap


@dataclass(frozen=True)
class Gain:
    """`of` less `against`, names of rows, in one figure of the table: mean over prompts, 95 % interval, p-value.

    metric: rougeL_mean, over the sampled answers; kl_to_teacher, there the mean over references of each one's KL per
    token, so that it may differ a little from the difference of the rows, which weigh by tokens.
    p: two-sided, by `paired_bootstrap`, after Holm over the metrics.
    """

    of: str
    against: str
    metric: str
    difference: float
    low: float
    high: float
    p: float
    prompts: int


def gains(folder: Path, of: str, against: str) -> list[Gain]:
    """Of two rows that were measured into one run folder; none of a single prompt.

    Errors: ValueError where one of the two has not every answer.
    """
    names = [f"{name.replace(' ', '-')}.jsonl" for name in (of, against)]
    scores = {
        "rougeL_mean": [prompt_scores(folder / "answers" / name) for name in names],
        "kl_to_teacher": [reference_divergences(folder / "references" / name) for name in names],
    }
    found = {metric: paired_bootstrap(*pair) for metric, pair in scores.items() if len(pair[0]) > 1}
    adjusted = holm([each.p_value for each in found.values()])
    return [
        Gain(of, against, metric, each.difference, each.low, each.high, p, each.prompts)
        for (metric, each), p in zip(found.items(), adjusted, strict=True)
    ]
