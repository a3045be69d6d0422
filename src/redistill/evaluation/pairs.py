"""Two evaluations side by side: the answers of two models to the same questions. Text only, no model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

Who = Literal["student", "teacher"]
Answers = Mapping[tuple[Any, int], Mapping[str, Any]]


@dataclass(frozen=True)
class Pair:
    """Two answers to one question.

    seed: of the sampled answers, or "greedy". index: the number of the prompt in its set, from 0.
    question: the prompt as rendered for the models, control tokens shown. reference: "" where there is none.
    """

    seed: Any
    index: int
    question: str
    first: str
    second: str
    reference: str = ""

    @property
    def key(self) -> tuple[Any, int]:
        """What tells one pair of a set from another."""
        return self.seed, self.index


@dataclass(frozen=True)
class Evaluated:
    """The answers of one model in an output folder of `redistill evaluate`. who: of its rows."""

    folder: Path
    who: Who = "student"

    def __str__(self) -> str:
        return str(self.folder) if self.who == "student" else f"{self.folder} ({self.who})"

    def file(self, name: str) -> Path:
        """The answers to a set; to data that is no named set, ""."""
        return self.folder / name / f"answers-{self.who}.jsonl"


@dataclass(frozen=True)
class PairedSet:
    """A set that two models have answered.

    name: "" for data that is no named set. title: the name, or where such data lies. version: of its text.
    template: how prompts were written for both models.
    """

    name: str
    title: str
    version: str
    template: str
    pairs: tuple[Pair, ...]

    @property
    def label(self) -> str:
        """The name, or the last part of where such data lies: a table has no room for paths."""
        return self.name or Path(self.title).name

    @property
    def seeds(self) -> list[Any]:
        """The seeds with which both models have answered; "greedy" first."""
        return sorted({pair.seed for pair in self.pairs}, key=_place)


def pair_folders(
    first: Evaluated, second: Evaluated, *, sets: Sequence[str] = (), limit: int | None = None
) -> list[PairedSet]:
    """The sets that both have answered, or those of them named in `sets`, in the order of `first`.

    limit: only the first so many prompts of each.
    Errors: ValueError for a folder that is no (finished) evaluation, for no set in common, for sets of another
    version, prompts of another template, one and the same answers twice; those of `pair_answers`.
    """
    ours, theirs = _results(first), _results(second)
    common = [name for name in ours.sets if name in theirs.sets]
    if not common or any(name not in common for name in sets):
        wanted = f"both have answered {', '.join(sets)}" if sets else "they have in common"
        raise ValueError(
            f"there is no set that {wanted}: {first} answers {ours.titles()}, {second} {theirs.titles()}. "
            "Evaluate both models on the same sets."
        )
    if ours.template != theirs.template:
        raise ValueError(
            f"{first} was asked with the template {ours.template} and {second} with {theirs.template}: "
            "evaluate both models with the same."
        )
    paired = []
    for name in dict.fromkeys(sets or common):
        (title, version), (_, other) = ours.sets[name], theirs.sets[name]
        if version != other:
            raise ValueError(
                f"{first} answers version {version} of {title} and {second} version {other}: evaluate both "
                "models on the same text."
            )
        pairs = tuple(pair_answers(first.file(name), second.file(name), limit=limit))
        paired.append(PairedSet(name, title, version, ours.template, pairs))
    return paired


def pair_answers(first: str | Path, second: str | Path, *, limit: int | None = None) -> list[Pair]:
    """The answers of two models to the same prompts, from the JSON lines that an evaluation wrote.

    Paired by seed and index, in the order of the first file; a seed that only one of them has is left out.
    limit: only the first so many prompts. ValueError where the files differ in prompts or have no seed in
    common, and for a line that is no such record, with its file and line.
    """
    first, second = Path(first), Path(second)
    if first.resolve() == second.resolve():
        raise ValueError(f"{first} would be compared with itself: name two models.")
    ours, theirs = _answers(first), _answers(second)
    seeds = {seed for seed, _ in ours} & {seed for seed, _ in theirs}
    if not seeds:
        raise ValueError(
            f"there are no answers in common: {first} has those of seeds {_listed(ours)}, {second} those of "
            f"seeds {_listed(theirs)}. Evaluate both models with the same seeds."
        )
    asked = [
        {key for key in found if key[0] in seeds and (limit is None or key[1] < limit)}
        for found in (ours, theirs)
    ]
    if missing := asked[0] ^ asked[1]:
        where = first if min(missing, key=str) in ours else second
        raise ValueError(
            f"{len(missing)} answers of {first} and {second} have no partner, such as seed and index "
            f"{min(missing, key=str)} of {where}: evaluate both models with the same data, to the end."
        )
    keys = [key for key in ours if key in asked[0]]
    for key in keys:
        if ours[key]["prompt"] != theirs[key]["prompt"]:
            raise ValueError(
                f"{first} and {second} answer different prompts (seed and index {key}): evaluate both models "
                "with the same data and template."
            )
    references = [(ours[key].get("references") or [""])[0] for key in keys]
    return [
        Pair(*key, ours[key]["prompt"], ours[key]["answer"], theirs[key]["answer"], reference)
        for key, reference in zip(keys, references, strict=True)
    ]


class _Results(NamedTuple):
    """What results.json says. sets: title and version by name, which is "" for data that is no named set."""

    template: str
    sets: dict[str, tuple[str, str]]

    def titles(self) -> str:
        return ", ".join(title if name else f"{title} (--data)" for name, (title, _) in self.sets.items())


def _results(side: Evaluated) -> _Results:
    try:
        found = json.loads((side.folder / "results.json").read_text(encoding="utf-8"))
        named = {row["set"] for row in found["rows"]}
        sets = {
            each["name"] if each["name"] in named else "": (each["name"], each["version"])
            for each in found["sets"]
        }
        if sets:
            return _Results(found["template"], sets)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(
        f"{side.folder} is no output folder of `redistill evaluate`, or its evaluation has not come to an end "
        "(there is no results.json with a set in it): evaluate a model with --output there."
    )


def _listed(found: Answers) -> str:
    return ", ".join(map(str, sorted({seed for seed, _ in found}, key=_place))) or "none"


def _place(seed: Any) -> tuple[bool, str | int]:
    return (seed != "greedy", seed)


def _answers(path: Path) -> Answers:
    if not path.is_file():
        raise ValueError(f"there is no file {path}: `redistill evaluate` writes the answers of a model.")
    found: dict[tuple[Any, int], Mapping[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            key, texts = (record["seed"], record["index"]), (record["prompt"], record["answer"])
            again = key in found
        except (ValueError, KeyError, TypeError) as problem:
            raise ValueError(
                f"{path}:{number} is no answer with seed, index, prompt and answer."
            ) from problem
        if again or not all(isinstance(text, str) for text in texts):
            fault = "answers a prompt twice with one seed" if again else "has an answer that is no text"
            raise ValueError(f"{path}:{number} {fault} (seed and index {key}).")
        found[key] = record
    return found
