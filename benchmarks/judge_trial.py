"""How good a judge a model is: `python benchmarks/judge_trial.py MODEL DOLLY_TEST.jsonl [PAIRS]`.

Each pair is a reference against the reference of another question: whoever can judge prefers the first.
"""

import json
import sys
from pathlib import Path

from redistill.evaluation.judge import compare_answers
from redistill.evaluation.pairs import Pair
from redistill.loading import load_model, load_tokenizer

name, data, *rest = sys.argv[1:]
records = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
short = [r for r in records if len(r["instruction"] + r["input"]) < 300 and 30 < len(r["output"]) < 400]
short = short[: int(rest[0]) if rest else 40]
answers = [r["output"] for r in short]
questions = ["\n\n".join(filter(None, (r["instruction"], r["input"]))) for r in short]
wrong = [*answers[1:], answers[0]]
pairs = [Pair(0, place, *each) for place, each in enumerate(zip(questions, answers, wrong, strict=True))]
found = compare_answers(load_model(name), load_tokenizer(name), pairs, batch_size=8)
right = sum(lead > 0 for lead in found.leads)
print(f"{len(answers)} pairs: {found.wins} wins, {found.ties} ties, {found.losses} losses;")
print(f"position bias {found.position_bias:+.2f}; the summed lead is right in {right}")
