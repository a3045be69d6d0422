"""ROUGE-L against the package it must equal, and the subsequence against the textbook's table."""

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from redistill.evaluation.rouge import RougeL, common_subsequence, rouge_l

WORDS = (
    "running",
    "runs",
    "ran",
    "quickly",
    "quick",
    "the",
    "a",
    "Answers",
    "42",
    "café",
    "don't",
    "re-do,",
    "…",
)


def text(draw: random.Random, most: int) -> str:
    return draw.choice([" ", "\n", ", "]).join(draw.choices(WORDS, k=draw.randint(0, most)))


def test_equals_rouge_score_with_one_and_several_references():
    draw, theirs, ours = random.Random(0), RougeScorer(["rougeL"], use_stemmer=True), RougeL()
    seen = set()
    for _ in range(300):
        references = [text(draw, 25) for _ in range(draw.randint(1, 4))]
        answer = text(draw, 40)
        wanted = 100 * theirs.score_multi(references, answer)["rougeL"].fmeasure
        assert ours.score(answer, references) == pytest.approx(wanted, abs=1e-9)
        seen.add(round(wanted))
    assert len(seen) > 20  # the texts were neither all alike nor all different


def test_best_reference_stems_and_range():
    assert rouge_l("The cats were RUNNING.", ["nothing alike", "the cat were run"]) == 100.0
    assert rouge_l("one two", ["one two three four"]) == pytest.approx(100 * 2 / 3)
    for empty in ("", " \n", "…", "日本語"):
        assert rouge_l(empty, ["one two"]) == 0.0
        assert rouge_l("one two", [empty]) == 0.0
    with pytest.raises(ValueError, match="reference"):
        rouge_l("one", [])


def test_a_known_reference_is_scored_as_when_it_was_new():
    scorer = RougeL()
    first = [scorer.score(answer, ["the quick fox"]) for answer in ("quick fox", "the fox", "")]
    again = [scorer.score(answer, ["the quick fox"]) for answer in ("quick fox", "the fox", "")]
    assert first == again == pytest.approx([80.0, 80.0, 0.0])


def test_common_subsequence_equals_the_table():
    def by_table(first: list[str], second: list[str]) -> int:
        table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, a in enumerate(first):
            for j, b in enumerate(second):
                table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
        return table[-1][-1]

    draw = random.Random(1)
    for _ in range(200):
        first, second = (draw.choices("abcde", k=draw.randint(0, 150)) for _ in range(2))
        assert common_subsequence(first, second) == by_table(first, second)
