"""Scores as arithmetic, and a whole evaluation on a tiny model."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from tiny import EOS_ID, tiny_llama, tiny_tokenizer

from redistill.evaluation.harness import evaluate_model
from redistill.evaluation.results import peak_memory_bytes, write_results
from redistill.evaluation.rouge import rouge_l
from redistill.evaluation.score import (
    EvaluationRow,
    distinct_n,
    mean_length,
    perplexity,
    share_cut,
    summarize,
)
from redistill.generate import Sampling, generate
from redistill.sample import Sample

TOKENIZER = tiny_tokenizer()
QUESTIONS = (
    "What is the capital of France?",
    "Write a short answer.",
    "Where is the old river?",
    "And then?",
)
REFERENCES = (
    ("The capital of France is Paris.", "Paris"),
    ("A short answer.",),
    ("Near the park.", "In the park", "the park"),
    ("x",),
)
FIELDS = {
    "name",
    "parameters",
    "rougeL_greedy",
    "rougeL_mean",
    "rougeL_std",
    "kl_to_teacher",
    "perplexity",
    "tokens_per_second",
}


def samples() -> list[Sample]:
    made = []
    for question, references in zip(QUESTIONS, REFERENCES, strict=True):
        response = (*TOKENIZER.encode(references[0], add_special_tokens=False), EOS_ID)
        made.append(Sample(tuple(TOKENIZER.encode(question)), response, source=question))
    return made


def evaluate(model, teacher, **changed) -> EvaluationRow:
    options = {
        "seeds": (10, 20),
        "temperature": 1.0,
        "top_p": 1.0,
        "greedy": True,
        "max_new_tokens": 6,
        "batch_size": 3,
        "eos": frozenset({EOS_ID}),
        "vocabulary": len(TOKENIZER),
        "answers_path": None,
        "progress": None,
    }
    given = {"samples": samples(), "references": REFERENCES} | changed
    asked, references = given.pop("samples"), given.pop("references")
    return evaluate_model("tiny", model, teacher, asked, references, TOKENIZER, **(options | given))


def answers(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def pair():
    return tiny_llama(len(TOKENIZER), layers=1, seed=1), tiny_llama(len(TOKENIZER), layers=2, seed=2)


def test_summarize_is_over_seeds_not_over_answers():
    mean, std = summarize([[10.0, 30.0], [20.0, 40.0], [0.0, 20.0]])
    assert mean == pytest.approx(20.0)
    assert std == pytest.approx(10.0)  # of 20, 30, 10
    assert summarize([[4.0, 8.0]]) == (6.0, None)
    assert summarize([]) == (None, None)
    with pytest.raises(ValueError, match="seed"):
        summarize([[1.0], []])


def test_what_else_is_said_about_answers():
    assert distinct_n([(1, 2, 3), (1, 2, 4)], 2) == 3 / 4  # 12 23 12 24
    assert distinct_n([(7,) * 11], 2) == 1 / 10
    assert distinct_n([(1,), ()], 2) == 0.0
    assert mean_length([(1, 2, 3), ()]) == 1.5
    assert share_cut([(1, 9), (1, 2), (), (9, 1)], {9}) == 3 / 4
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) == math.inf


def test_the_same_seeds_give_the_same_row_and_answers(pair, tmp_path):
    rows = [evaluate(*pair, answers_path=tmp_path / f"{run}.jsonl") for run in ("a", "b")]
    still = [replace(row, tokens_per_second=None) for row in rows]
    assert still[0] == still[1]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert rows[0].tokens_per_second > 0
    assert rows[0].rougeL_std is not None
    evaluate(*pair, seeds=(11,), answers_path=tmp_path / "c.jsonl")
    first, other = answers(tmp_path / "a.jsonl"), answers(tmp_path / "c.jsonl")
    assert [r["answer"] for r in first[:4]] == [r["answer"] for r in other[:4]]  # greedy
    assert [r["answer"] for r in first[4:8]] != [r["answer"] for r in other[4:8]]  # seeds 10 and 11


def test_every_answer_is_kept_and_the_row_follows_from_them(pair, tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    row = evaluate(*pair, answers_path=path)
    kept = answers(path)
    assert [(k["seed"], k["index"]) for k in kept] == [
        (seed, index) for seed in ("greedy", 10, 20) for index in range(4)
    ]
    for record in kept:
        assert record["name"] == "tiny"
        assert record["prompt"] == QUESTIONS[record["index"]]
        assert tuple(record["references"]) == REFERENCES[record["index"]]
        assert record["rougeL"] == pytest.approx(rouge_l(record["answer"], record["references"]))
    scores = {seed: [k["rougeL"] for k in kept if k["seed"] == seed] for seed in ("greedy", 10, 20)}
    assert row.rougeL_greedy == pytest.approx(sum(scores.pop("greedy")) / 4)
    assert (row.rougeL_mean, row.rougeL_std) == pytest.approx(summarize(list(scores.values())))
    ids = generate(
        pair[0],
        [s.prompt for s in samples()],
        limits=[6] * 4,
        sampling=Sampling(),
        eos=frozenset({EOS_ID}),
        generator=torch.Generator().manual_seed(20),
        batch_size=1,
    )
    said = [k["answer"] for k in kept if k["seed"] == 20]
    assert said == [TOKENIZER.decode(answer, skip_special_tokens=True) for answer in ids]


def test_kl_and_perplexity_are_those_of_the_models(pair):
    student, teacher = pair
    kl = nll = tokens = 0.0
    with torch.no_grad():
        for sample in samples():
            ids = torch.tensor([sample.prompt + sample.response])
            at = slice(len(sample.prompt) - 1, -1)
            q, p = (model(ids).logits[0, at].double().log_softmax(-1) for model in pair)
            kl += float((p.exp() * (p - q)).sum())
            nll -= float(q.gather(-1, torch.tensor(sample.response)[:, None]).sum())
            tokens += len(sample.response)
    row = evaluate(student, teacher, seeds=(), greedy=False)
    assert row.kl_to_teacher == pytest.approx(kl / tokens, rel=1e-4)
    assert row.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert row.parameters == sum(p.numel() for p in student.parameters())
    assert (row.rougeL_greedy, row.rougeL_mean, row.tokens_per_second) == (None, None, None)
    assert evaluate(teacher, None, seeds=(), greedy=False).kl_to_teacher == 0.0


def test_limits_progress_and_modes(pair):
    student, teacher = pair
    student.train()
    told = []
    longest = max(len(sample.prompt) for sample in samples())
    prompt_only = [replace(sample, response=()) for sample in samples()]
    row = evaluate(
        student,
        teacher,
        samples=prompt_only,
        seeds=(1,),
        max_length=longest,
        progress=lambda *call: told.append(call),
    )
    assert student.training
    student.eval()
    stages = ("greedy answers", "sampled answers, seeds 1", "reading the references", "done")
    assert told == [(stage, done, 3) for done, stage in enumerate(stages)]
    room = [min(6, longest - len(sample.prompt)) for sample in samples()]
    assert row.mean_tokens <= sum(room) / 4 < 6
    assert (row.kl_to_teacher, row.perplexity, row.rougeL_std) == (None, None, None)


def test_what_cannot_be_evaluated_is_said(pair):
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(*pair, samples=[], references=[])
    with pytest.raises(ValueError, match=r"Where is the old river\?.*no reference"):
        evaluate(*pair, references=(*REFERENCES[:2], (), REFERENCES[3]))
    with pytest.raises(ValueError, match="4 prompts but 3"):
        evaluate(*pair, references=REFERENCES[:3])


def test_results_file(tmp_path):
    row = EvaluationRow("teacher", 7, 24.5, 23.25, 0.5, 0.0, math.inf, 310.0)
    path = tmp_path / "run" / "results.json"
    write_results(
        path,
        [row],
        seeds=(10, 20),
        seconds=1.5,
        peak_memory_bytes=peak_memory_bytes(),
        steps=4,
        temperature=1.0,
    )

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    read = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert read["rows"] == [asdict(row) | {"perplexity": None}]
    assert read["rows"][0].keys() >= FIELDS
    assert read["seeds"] == [10, 20]
    assert read["seconds"] == 1.5
    assert read["settings"] == {"steps": 4, "temperature": 1.0}
    assert read["versions"].keys() == {"redistill", "torch", "transformers", "python"}
    assert read["versions"]["torch"] == torch.__version__
    assert 50e6 < read["peak_memory_bytes"] < 1e12
    assert [each.name for each in path.parent.iterdir()] == ["results.json"]
