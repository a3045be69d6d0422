"""A small world, and instructions about it whose answers can be checked.

Five kinds. Every answer is a chain in which each step rests on the one before, so that one early mistake spoils
what follows. The facts (which town lies next to which, what things cost, who sits beside whom) are never in the
instruction: a model has to have learnt them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from string import Formatter

# In this order along one road.
TOWNS = ("Varn", "Oslet", "Miro", "Bray", "Tulla", "Asher", "Pell", "Ysk", "Corvo", "Hale", "Font", "Weir")
# In this order round one table, clockwise.
PEOPLE = ("Ida", "Tom", "Ravi", "Lena", "Omar", "Beth", "Hugo", "Mina")
PRICES = {
    "bread": 4,
    "milk": 2,
    "jam": 5,
    "rice": 3,
    "tea": 4,
    "salt": 1,
    "soap": 5,
    "oil": 3,
    "corn": 2,
    "nuts": 1,
}
# Paint mixes by their places in this list: the sum, round the list.
COLOURS = ("white", "blue", "green", "pink", "grey", "black")
LARGEST = 40

WORDINGS = {
    "road": (
        "How do I get from {a} to {b}?",
        "I am in {a}. Show me the way to {b}.",
        "Which towns do I pass on the road to {b} from {a}?",
        "Please describe the trip from {a} to {b}.",
        "My goal is {b} and I start in {a}. Where do I go?",
    ),
    "shop": (
        "{who} buys {things}. What does it cost?",
        "Add up the bill of {who}: {things}.",
        "What must {who} pay for {things}?",
        "In the basket of {who} there are {things}. Please work out the price.",
        "{who} wants {things}. How much is that?",
    ),
    "sum": (
        "Start at {a} and add {numbers}.",
        "What do you get from {a} if you add {numbers}?",
        "Please add {numbers} to {a}, one after the other.",
        "Take {a}, then more: {numbers}. Show every step.",
    ),
    "ball": (
        "{who} has the ball. It goes {turns}. Who has it now?",
        "The ball starts with {who} and is passed {turns}. Where does it end?",
        "Follow the ball from {who}: {turns}.",
        "At first the ball is with {who}. Then it moves {turns}. Please say who holds it.",
    ),
    "paint": (
        "Stir {colours} into a pot of {a}. What colour comes out?",
        "A pot of {a} gets {colours}. Please follow the colour.",
        "What becomes of {a} paint if I mix in {colours}?",
        "I have {a} paint and add {colours}. Show every step.",
    ),
}


@dataclass(frozen=True)
class Task:
    """One instruction, its only right answer and its kind."""

    kind: str
    instruction: str
    answer: str


def _road(rng: random.Random) -> tuple[dict[str, object], str]:
    start, end = rng.sample(range(len(TOWNS)), 2)
    while abs(end - start) > 9:
        start, end = rng.sample(range(len(TOWNS)), 2)
    way = [TOWNS[i] for i in range(start, end, 1 if end > start else -1)] + [TOWNS[end]]
    steps = ", ".join(f"from {a} to {b}" for a, b in pairwise(way))
    return {"a": way[0], "b": way[-1]}, f"The road goes {steps}. Then you are in {way[-1]}."


def _shop(rng: random.Random) -> tuple[dict[str, object], str]:
    who, things = rng.choice(PEOPLE), rng.sample(sorted(PRICES), rng.randint(2, 7))
    total, steps = 0, []
    for thing in things:
        total += PRICES[thing]
        steps.append(f"{thing} for {PRICES[thing]} makes {total}")
    return {"who": who, "things": _listed(things)}, f"The {', the '.join(steps)}. {who} pays {total}."


def _sum(rng: random.Random) -> tuple[dict[str, object], str]:
    numbers = rng.choices(range(1, 6), k=rng.randint(2, 7))
    total = start = rng.randint(0, LARGEST - sum(numbers))
    steps = []
    for number in numbers:
        total += number
        steps.append(f"add {number} makes {total}")
    return {"a": start, "numbers": _listed(numbers)}, f"From {start} {', '.join(steps)}. The end is {total}."


def _ball(rng: random.Random) -> tuple[dict[str, object], str]:
    seat, turns = rng.randrange(len(PEOPLE)), rng.choices(("left", "right"), k=rng.randint(2, 8))
    who, steps = PEOPLE[seat], []
    for turn in turns:
        seat = (seat + (1 if turn == "left" else -1)) % len(PEOPLE)
        steps.append(f"{turn} to {PEOPLE[seat]}")
    return {
        "who": who,
        "turns": _listed(turns),
    }, f"The ball goes {', '.join(steps)}. Now {PEOPLE[seat]} has it."


def _paint(rng: random.Random) -> tuple[dict[str, object], str]:
    start, added, steps = rng.choice(COLOURS), rng.choices(COLOURS, k=rng.randint(2, 7)), []
    now = start
    for colour in added:
        now = COLOURS[(COLOURS.index(now) + COLOURS.index(colour)) % len(COLOURS)]
        steps.append(f"{colour} makes it {now}")
    return {"a": start, "colours": _listed(added)}, f"In {start} paint {', then '.join(steps)}. We get {now}."


def _listed(words: Sequence[object]) -> str:
    return f"{', '.join(map(str, words[:-1]))} and {words[-1]}"


KINDS: dict[str, Callable[[random.Random], tuple[dict[str, object], str]]] = {
    "road": _road, "shop": _shop, "sum": _sum, "ball": _ball, "paint": _paint,
}  # fmt: skip


def tasks(rng: random.Random) -> Iterator[Task]:
    """Instructions without end, kinds in turn; now and then one comes again."""
    while True:
        for kind, make in KINDS.items():
            blanks, answer = make(rng)
            yield Task(kind, rng.choice(WORDINGS[kind]).format(**blanks), answer)


def spoilt(task: Task, rng: random.Random) -> Task:
    """The task with one mistake in its answer, a name, number or turn for another; what follows is unchanged."""
    kinds = (TOWNS, PEOPLE, COLOURS, ("left", "right"), tuple(map(str, range(LARGEST + 1))))
    found = [(at, kind) for at in re.finditer(r"\w+", task.answer) for kind in kinds if at.group() in kind]
    at, kind = rng.choice(found)
    wrong = rng.choice([word for word in kind if word != at.group()])
    return replace(task, answer=task.answer[: at.start()] + wrong + task.answer[at.end() :])


def words() -> list[str]:
    """Every word that instruction or answer can hold, punctuation apart."""
    wordings = [
        text for kind in WORDINGS.values() for wording in kind for text, *_ in Formatter().parse(wording)
    ]
    answers = [make(random.Random(0))[1] for make in KINDS.values()]
    fixed = "".join(c if c.isalpha() else " " for c in " ".join(wordings + answers)).split()
    numbers = map(str, range(LARGEST + 1))
    return sorted({*fixed, "and", "left", "right", *TOWNS, *PEOPLE, *PRICES, *COLOURS, *numbers})
