"""A judge over a comparison: what it says of every method's answers against the baseline's, seed by seed.

OUTPUT/judge/asked.json                    what judges, and how much of each set
OUTPUT/judge/METHOD/seed-N/[SET/]judgements.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from redistill.compare.lines import LEVEL
from redistill.compare.plan import Plan
from redistill.compare.runs import Run, keep_to
from redistill.evaluation.pairs import Evaluated, pair_folders
from redistill.evaluation.significance import holm, paired_bootstrap
from redistill.judging import Judged, JudgeRequest, judge_sets, load_judge
from redistill.models import load_tokenizer


@dataclass(frozen=True)
class Verdict:
    """One method against the baseline on one set, over the training seeds that both came to the end of.

    wins, ties, losses: of the method's answers. difference, low, high: mean verdict (1 won, 0 tied, -1 lost) and its
    interval; p: by `paired_bootstrap` over prompts and training seeds, after Holm over all lines. position_bias: mean
    over seeds; at 1 or -1 the judge only sees which answer stands first.
    """

    set: str
    method: str
    seeds: int
    wins: int
    ties: int
    losses: int
    difference: float
    low: float
    high: float
    p: float
    position_bias: float


def look_for_judge(plan: Plan, output: Path) -> None:
    """What can be said of the judge before hours of training.

    Raises ValueError where it is not there, and where `output` holds another judge's verdicts.
    """
    asked = plan.comparison.judge
    if asked is not None:
        load_tokenizer(asked.model)
        keep_to({output / "judge": {**asked.model_dump(), "baseline": plan.baseline}})


def judge_methods(plan: Plan, runs: Sequence[Run], output: Path, console: Console) -> list[Verdict]:
    """Every verdict, the judgements kept and gone on with; a run's are made anew where its answers have become more.
    None where the comparison names no judge."""
    asked, baseline = plan.comparison.judge, plan.baseline
    if asked is None:
        return []
    good = {(run.method, run.seed): run.folder / "evaluation" for run in runs if not run.failed}
    judge = load_judge(asked.model, asked.dtype)
    judged: dict[tuple[str, str], list[Judged]] = {}
    for (method, seed), folder in good.items():
        if method == baseline or (baseline, seed) not in good:
            continue
        paired = pair_folders(Evaluated(folder), Evaluated(good[baseline, seed]), limit=asked.limit)
        place = output / "judge" / method / f"seed-{seed}"
        request = JudgeRequest(batch_size=asked.batch_size)
        wanted = [each for each in paired if each.name in (plan.request.sets or ("",))]
        for each in judge_sets(judge, wanted, place, console, request, anew=True):
            judged.setdefault((each.paired.name, method), []).append(each)
    verdicts = [_summed_up(*key, each) for key, each in judged.items()]
    adjusted = holm([each.p for each in verdicts])
    return [replace(each, p=p) for each, p in zip(verdicts, adjusted, strict=True)]


def _summed_up(name: str, method: str, judged: Sequence[Judged]) -> Verdict:
    said = [each.verdicts for each in judged]
    scores = [each.by_prompt for each in said]
    told = paired_bootstrap(scores, [[0.0] * len(row) for row in scores])
    return Verdict(
        name,
        method,
        len(said),
        sum(each.wins for each in said),
        sum(each.ties for each in said),
        sum(each.losses for each in said),
        told.difference,
        told.low,
        told.high,
        told.p_value,
        sum(each.position_bias for each in said) / len(said),
    )


def verdict_notes(plan: Plan, verdicts: Sequence[Verdict]) -> list[str]:
    """What the judge said, as lines of text; nothing without a judge."""
    if plan.comparison.judge is None:
        return []
    text = [
        f"Judge {plan.comparison.judge.model}, blind and in both orders, against {plan.baseline}: wins/ties/losses, "
        "mean verdict (1 won, -1 lost) with its 95 % interval, p after Holm."
    ]
    for each in verdicts:
        mark = " ▲" if each.difference > 0 else " ▼"
        text.append(
            f"{each.method}{' on ' + each.set if each.set else ''}: {each.wins}/{each.ties}/{each.losses}, "
            f"{each.difference:+.2f} [{each.low:+.2f}, {each.high:+.2f}], p {each.p:.2g}"
            f"{mark if each.p <= LEVEL else ''}; position bias {each.position_bias:+.2f}"
        )
    return text
