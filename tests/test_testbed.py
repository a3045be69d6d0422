"""The testbed's small world: its answers follow from its instructions, and its tokens give the text back."""

from __future__ import annotations

import json
import random
import re
import sys
from itertools import islice, pairwise
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "testbed"))
import make_testbed
import world

TASKS = list(islice(world.tasks(random.Random(5)), 1000))


def named(text: str, words) -> list[str]:
    return [word for word in re.findall(r"\w+", text) if word in words]


def road(asked: str, answer: str) -> bool:
    steps = [tuple(step.split(" to ")) for step in re.findall(r"from (\w+ to \w+)", answer)]
    beside = all(abs(world.TOWNS.index(a) - world.TOWNS.index(b)) == 1 for a, b in steps)
    joined = all(first[1] == second[0] for first, second in pairwise(steps))
    straight = len({world.TOWNS.index(b) - world.TOWNS.index(a) for a, b in steps}) == 1
    start = re.search(r"(?:from|in) (\w+)", asked)[1]
    (end,) = (town for town in named(asked, world.TOWNS) if town != start)
    return (
        beside
        and joined
        and straight
        and (steps[0][0], steps[-1][1]) == (start, end)
        and f"in {end}." in answer
    )


def shop(asked: str, answer: str) -> bool:
    things = named(asked, world.PRICES)
    total, said = 0, re.findall(r"the (\w+) for (\d+) makes (\d+)", answer.replace("The", "the"))
    for thing, (own, price, makes) in zip(things, said, strict=True):
        total += world.PRICES[thing]
        if (thing, world.PRICES[thing], total) != (own, int(price), int(makes)):
            return False
    return answer.endswith(f"{named(asked, world.PEOPLE)[0]} pays {total}.")


def sums(asked: str, answer: str) -> bool:
    said = [(int(a), int(b)) for a, b in re.findall(r"add (\d+) makes (\d+)", answer)]
    start, end = int(re.search(r"From (\d+)", answer)[1]), int(re.search(r"end is (\d+)", answer)[1])
    totals = [start, *(total for _, total in said)]
    numbers = [number for number, _ in said]
    given = [int(n) for n in re.findall(r"\d+", asked)]
    right = [b - a for a, b in pairwise(totals)] == numbers and totals[-1] == end
    return right and given in ([start, *numbers], [*numbers, start])


def ball(asked: str, answer: str) -> bool:
    start, *_ = named(asked, world.PEOPLE)
    said = re.findall(r"(left|right) to (\w+)", answer)
    seats = [world.PEOPLE.index(name) for name in (start, *(name for _, name in said))]
    moves = [
        {1: "left", len(world.PEOPLE) - 1: "right"}.get((b - a) % len(world.PEOPLE))
        for a, b in pairwise(seats)
    ]
    return moves == [turn for turn, _ in said] == named(asked, ("left", "right")) and answer.endswith(
        f"Now {said[-1][1]} has it."
    )


def paint(asked: str, answer: str) -> bool:
    place = {colour: number for number, colour in enumerate(world.COLOURS)}
    said = re.findall(r"(\w+) makes it (\w+)", answer)
    start = re.search(r"In (\w+) paint", answer)[1]
    now = [place[start], *(place[colour] for _, colour in said)]
    moved = [(b - a) % len(place) for a, b in pairwise(now)]
    given, added = named(asked, world.COLOURS), [colour for colour, _ in said]
    right = moved == [place[colour] for colour in added] and f"get {said[-1][1]}." in answer
    return right and given in ([start, *added], [*added, start])


SOLVERS = {"road": road, "shop": shop, "sum": sums, "ball": ball, "paint": paint}


@pytest.mark.parametrize("kind", SOLVERS)
def test_every_answer_follows_from_its_instruction(kind):
    own = [task for task in TASKS if task.kind == kind]
    assert len(own) == 200
    wrong = [task for task in own if not SOLVERS[kind](task.instruction, task.answer)]
    assert not wrong, wrong[0]


def test_a_wrong_step_is_seen():
    task = next(task for task in TASKS if task.kind == "shop")
    first = re.search(r"makes (\d+)", task.answer)
    assert not shop(task.instruction, task.answer.replace(first.group(), f"makes {int(first[1]) + 1}", 1))


@pytest.mark.parametrize("kind", SOLVERS)
def test_a_spoilt_answer_has_one_wrong_word(kind):
    for task in [task for task in TASKS if task.kind == kind][:50]:
        wrong = world.spoilt(task, random.Random(task.answer))
        assert wrong.instruction == task.instruction
        before, after = (re.findall(r"\w+", each.answer) for each in (task, wrong))
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
        assert not SOLVERS[kind](wrong.instruction, wrong.answer)


def test_tokens_give_the_text_back_and_know_every_word():
    tokenizer = make_testbed.make_tokenizer()
    assert len(tokenizer) <= 4096
    for task in TASKS:
        for text in (task.instruction, task.answer):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
        assert 10 <= len(ids) <= 60


def test_what_is_held_out_is_not_taught(tmp_path, monkeypatch):
    for name, size in {"TEST": 50, "DEV": 20, "TEACH": 2000, "TRAIN": 300}.items():
        monkeypatch.setattr(make_testbed, name, size)
    monkeypatch.setattr(make_testbed, "TEACHER", make_testbed.STUDENT)
    make_testbed.main([str(tmp_path)])
    parts = {}
    for name in ("test", "dev", "teach", "train"):
        lines = (tmp_path / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        parts[name] = [json.loads(line)["instruction"] for line in lines]
    held = {*parts["test"], *parts["dev"]}
    assert len(held) == 70 and held.isdisjoint(parts["teach"]) and parts["train"] == parts["teach"][:300]
