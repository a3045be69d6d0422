"""Two files of answers to the same prompts, side by side: what a judge compares. Text only, no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Pairs(NamedTuple):
    """Two answers to each of N prompts, in the order of the first file.

    prompts: as rendered for the models, control tokens shown. references: "" where the files have none.
    keys: (seed, index), the seed or "greedy" and the number of the prompt.
    """

    prompts: tuple[str, ...]
    first: tuple[str, ...]
    second: tuple[str, ...]
    references: tuple[str, ...]
    keys: tuple[tuple[Any, int], ...]


def pair_answers(first: str | Path, second: str | Path) -> Pairs:
    """The answers of two models to the same prompts, from the JSON lines that an evaluation wrote.

    Paired by seed and index. ValueError where the files differ in prompts or seeds, and for a line that is no
    such record, with its file and line.
    """
    ours, theirs = _answers(Path(first)), _answers(Path(second))
    if missing := ours.keys() ^ theirs.keys():
        where = first if min(missing, key=str) in ours else second
        raise ValueError(
            f"{len(missing)} answers of {first} and {second} have no partner, such as seed and index "
            f"{min(missing, key=str)} of {where}: evaluate both models with the same data and seeds."
        )
    for key, record in ours.items():
        if record["prompt"] != theirs[key]["prompt"]:
            raise ValueError(
                f"{first} and {second} answer different prompts (seed and index {key}): evaluate both models "
                "with the same data and template."
            )
    return Pairs(
        prompts=tuple(record["prompt"] for record in ours.values()),
        first=tuple(record["answer"] for record in ours.values()),
        second=tuple(theirs[key]["answer"] for key in ours),
        references=tuple((record.get("references") or [""])[0] for record in ours.values()),
        keys=tuple(ours),
    )


def _answers(path: Path) -> dict[tuple[Any, int], Mapping[str, Any]]:
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
