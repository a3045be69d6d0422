"""Whether two runs that were asked the same differ by more than chance: from their kept answers, prompt by prompt."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from redistill.evaluation.significance import Comparison, holm, paired_bootstrap
from redistill.report.figures import p_text, signed
from redistill.report.plain import number, short
from redistill.report.scores import LEVEL, Row, better, read_json
from redistill.runlog import read

LABELS = {"rougeL_mean": ("ROUGE-L", 2), "rougeL_greedy": ("greedy ROUGE-L", 2), "kl_to_teacher": ("KL", 3)}


class Kept(NamedTuple):
    """A trained student's row, and the file of its answers."""

    row: Row
    answers: Path

    @property
    def references(self) -> Path:
        """How it read the references: answers/X.jsonl -> references/X.jsonl, answers-X -> references-X."""
        if self.answers.parent.name == "answers":
            return self.answers.parent.with_name("references") / self.answers.name
        return self.answers.with_name(self.answers.name.replace("answers", "references", 1))


def tell_apart(kept: Sequence[Kept]) -> list[str]:
    """Note under `between` of each row but a set's first one how it differs from that; what was not tested, and why.

    The same paired bootstrap over prompts as everywhere, Holm's correction over all of a set. It compares the trained
    students: what another training seed would have given, only `redistill compare` tells.
    """
    untested: list[str] = []
    for name in dict.fromkeys(each.row["set"] for each in kept):
        first, *others = [each for each in kept if each.row["set"] == name]
        found: list[tuple[Row, str, Comparison]] = []
        for other in others:
            tests, why = _compared(other, first)
            found += [(other.row, metric, each) for metric, each in tests.items()]
            untested += [f"{_name(other)} and {_name(first)}: {each}" for each in why]
        adjusted = holm([each.p_value for _, _, each in found])
        for (row, metric, each), p in zip(found, adjusted, strict=True):
            values = {"difference": each.difference, "low": each.low, "high": each.high, "p": p}
            row["between"][metric] = {
                "against": _name(first),
                **{key: short(value) for key, value in values.items()},
                "prompts": each.prompts,
            }
    return untested


def in_words(row: Row) -> str:
    """What is more than chance between a run and the first one; "" where nothing was tested."""
    said = [
        f"{label} {signed(test['difference'], digits)} (95 % interval {signed(test['low'], digits)} to "
        f"{signed(test['high'], digits)}, p {p_text(test['p'])}): {_judged(metric, test)}"
        for metric, (label, digits) in LABELS.items()
        if (test := row["between"].get(metric)) is not None
    ]
    first = next((test["against"] for test in row["between"].values()), "")
    where = f" on {row['set']}" if row["set"] else ""
    return f"{row['of'] or row['name']} against {first}{where}: {'; '.join(said)}." if said else ""


def _judged(metric: str, test: Mapping[str, Any]) -> str:
    if test["p"] > LEVEL:
        return "not clearly different"
    return "better" if better(metric, test["difference"]) else "worse"


def _compared(other: Kept, first: Kept) -> tuple[dict[str, Comparison], list[str]]:
    rouge = [dict(_rouge(each.answers)) for each in (other, first)]
    if not all(rouge):
        return {}, ["not every answer is kept, so nothing is tested between them."]
    how = [_settings(each.answers, ("template", "limits", "temperature", "top_p")) for each in (other, first)]
    if how[0] != how[1] or rouge[0].keys() != rouge[1].keys():
        return {}, ["they were not asked the same in the same way, so nothing is tested between them."]
    tests = {"rougeL_greedy" if other.row["rougeL_mean"] is None else "rougeL_mean": _bootstrap(*rouge)}
    kl = [dict(_divergences(each.references)) for each in (other, first)]
    if not all(kl) or kl[0].keys() != kl[1].keys():
        return tests, []
    teachers = [_settings(each.references, ("teacher",)) for each in (other, first)]
    if teachers[0] != teachers[1]:
        return tests, ["their teachers are not the same, so KL is not tested between them."]
    return {**tests, "kl_to_teacher": _bootstrap(*kl)}, []


def _bootstrap(a: Mapping[Any, float], b: Mapping[Any, float]) -> Comparison:
    return paired_bootstrap(list(a.values()), [b[key] for key in a])


def _rouge(file: Path) -> Iterator[tuple[tuple[Any, ...], float]]:
    """Each prompt's ROUGE-L, the mean over its sampled answers, or its greedy one where nothing was sampled; nothing
    where an answer is missing."""
    sampled: dict[tuple[Any, ...], dict[str, float]] = {}
    greedy: dict[tuple[Any, ...], dict[str, float]] = {}
    for record in read(file):
        key, seed, value = (
            (record.get("index"), record.get("prompt")),
            record.get("seed"),
            number(record.get("rougeL")),
        )
        if value is not None:
            (greedy if seed == "greedy" else sampled).setdefault(key, {})[str(seed)] = value
    scores = sampled or greedy
    if len({frozenset(each) for each in scores.values()}) == 1:
        yield from ((key, statistics.fmean(each.values())) for key, each in scores.items())


def _divergences(file: Path) -> Iterator[tuple[tuple[Any, ...], float]]:
    for record in read(file):
        kl, tokens = number(record.get("kl")), number(record.get("tokens"))
        if kl is not None and tokens:
            yield (record.get("index"), tokens), kl / tokens


def _settings(file: Path, names: Sequence[str]) -> list[Any]:
    """What stands beside a file of how it came about (`evaluation/kept.py`)."""
    found = read_json(file.with_suffix(".settings.json"))
    settings = found.get("settings") if isinstance(found, dict) else None
    return [settings.get(name) if isinstance(settings, dict) else None for name in names]


def _name(kept: Kept) -> str:
    return kept.row["of"] or kept.row["name"]
