"""Scores as arithmetic, and a whole evaluation on a tiny model."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from rich.console import Console
from tiny import EOS_ID, tiny_llama, tiny_tokenizer

from redistill import commands, judging
from redistill.evaluation.answers import prompt_scores, read_answers
from redistill.evaluation.exposure import answer_divergences, excess_error
from redistill.evaluation.harness import evaluate_model
from redistill.evaluation.kept import Keep
from redistill.evaluation.pairs import Evaluated
from redistill.evaluation.results import SetRecord, peak_memory_bytes, write_results
from redistill.evaluation.rouge import rouge_l
from redistill.evaluation.score import (
    EvaluationRow,
    distinct_n,
    exact_match,
    mean_length,
    perplexity,
    self_repetition,
    share_cut,
    summarize,
)
from redistill.generate import generate
from redistill.judging import JudgeRequest, judge_folders
from redistill.measure import Request
from redistill.runlog import alone
from redistill.sample import Sample
from redistill.sampling import Sampling
from redistill.versions import git_hash

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
        "progress": None,
    }
    given = {"samples": samples(), "references": REFERENCES} | changed
    asked, references = given.pop("samples"), given.pop("references")
    return evaluate_model("tiny", model, teacher, asked, references, TOKENIZER, **(options | given))


def answers(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def keep(folder, **changed) -> Keep:
    files = {kind: folder / f"{kind}.jsonl" for kind in ("answers", "references", "exposure")}
    return Keep(**({"set": "made", "version": "1-0", "template": "plain", **files} | changed))


def still(row: EvaluationRow) -> EvaluationRow:
    """The row without the one figure that may change from run to run."""
    return replace(row, tokens_per_second=None)


def without_seconds(path) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in answers(path)]


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
    assert self_repetition([(1, 2, 3), (1, 2) * 4, (7,) * 7]) == pytest.approx((3 / 5 + 3 / 4) / 2)
    assert self_repetition([(1, 2, 3, 4, 5)]) == 0.0
    assert self_repetition([(1, 2)]) is None
    said, wanted = (
        [" Paris\n", "the  park", "paris", ""],
        [("x", "Paris"), ("the\npark",), ("Paris",), ("x",)],
    )
    assert exact_match(said, wanted) == 50.0
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) == math.inf


def test_the_same_seeds_give_the_same_row_and_answers(pair, tmp_path):
    rows = [evaluate(*pair, keep=keep(tmp_path / run)) for run in ("a", "b")]
    assert still(rows[0]) == still(rows[1])
    first, second = (without_seconds(tmp_path / run / "answers.jsonl") for run in ("a", "b"))
    assert first == second
    assert rows[0].tokens_per_second > 0
    assert rows[0].rougeL_std is not None
    evaluate(*pair, seeds=(11,), keep=keep(tmp_path / "c"))
    other = without_seconds(tmp_path / "c" / "answers.jsonl")
    assert [r["ids"] for r in first[:4]] == [r["ids"] for r in other[:4]]  # greedy
    assert [r["ids"] for r in first[4:8]] != [r["ids"] for r in other[4:8]]  # seeds 10 and 11
    # A seed more, in the same file: what is there stays.
    evaluate(*pair, seeds=(10, 20, 11), keep=keep(tmp_path / "a"))
    more = without_seconds(tmp_path / "a" / "answers.jsonl")
    assert [r["seed"] for r in more] == ["greedy"] * 4 + [10] * 4 + [11] * 4 + [20] * 4
    assert [r for r in more if r["seed"] != 11] == first
    assert [r["ids"] for r in more if r["seed"] == 11] == [r["ids"] for r in other[4:]]


def test_every_answer_is_kept_and_the_row_follows_from_them(pair, tmp_path):
    row = evaluate(*pair, keep=keep(tmp_path / "new"))
    path = tmp_path / "new" / "answers.jsonl"
    kept = answers(path)
    assert [(k["seed"], k["index"]) for k in kept] == [
        (seed, index) for seed in ("greedy", 10, 20) for index in range(4)
    ]
    for record in kept:
        assert (record["name"], record["set"]) == ("tiny", "made")
        assert record["prompt"] == QUESTIONS[record["index"]]
        assert tuple(record["references"]) == REFERENCES[record["index"]]
        assert record["rougeL"] == pytest.approx(rouge_l(record["answer"], record["references"]))
    scores = {seed: [k["rougeL"] for k in kept if k["seed"] == seed] for seed in ("greedy", 10, 20)}
    assert row.rougeL_greedy == pytest.approx(sum(scores.pop("greedy")) / 4)
    assert (row.rougeL_mean, row.rougeL_std) == pytest.approx(summarize(list(scores.values())))
    assert prompt_scores(path) == pytest.approx(
        [sum(pair) / 2 for pair in zip(*scores.values(), strict=True)]
    )
    ids = {
        seed: generate(
            pair[0],
            [s.prompt for s in samples()],
            limits=[6] * 4,
            sampling=Sampling(),
            eos=frozenset({EOS_ID}),
            generator=torch.Generator().manual_seed(seed),
            batch_size=1,
        )
        for seed in (10, 20)
    }
    for seed, written in ids.items():
        assert read_answers(path, seed, QUESTIONS) == written
    said = [k["answer"] for k in kept if k["seed"] == 20]
    assert said == [TOKENIZER.decode(answer, skip_special_tokens=True) for answer in ids[20]]
    bare = [[a[:-1] if a[-1] == EOS_ID else a for a in each] for each in ids.values()]
    for n, shown in ((1, row.distinct_1), (2, row.distinct_2), (4, row.distinct_4)):
        assert shown == pytest.approx(sum(distinct_n(each, n) for each in bare) / 2)
    assert row.self_repetition == pytest.approx(sum(self_repetition(each) for each in bare) / 2)
    seconds = sum(k["seconds"] for k in kept)
    assert row.tokens_per_second == pytest.approx(sum(len(k["ids"]) for k in kept) / seconds)
    with pytest.raises(ValueError, match="no answer of seed 30 to prompt 0"):
        read_answers(path, 30, QUESTIONS)
    with pytest.raises(ValueError, match="another prompt 1"):
        read_answers(path, 10, [QUESTIONS[0], "What else?"])


def test_exposure_is_read_from_the_kept_answers(tmp_path):
    student, teacher = (tiny_llama(len(TOKENIZER), layers=1, seed=seed) for seed in (3, 4))
    questions = [Sample(sample.prompt, (), source=sample.source) for sample in samples()] * 3
    options = {
        "samples": questions, "references": REFERENCES * 3, "greedy": False, "seeds": (10,),
        "max_new_tokens": 20, "batch_size": 12, "eos": frozenset({EOS_ID, *range(4, 8)}),
    }  # fmt: skip
    row = evaluate(teacher, teacher, keep=keep(tmp_path / "teacher"), **options)
    assert row.excess_error is None and not (tmp_path / "teacher" / "exposure.json").exists()
    theirs = read_answers(tmp_path / "teacher" / "answers.jsonl", 10, QUESTIONS * 3)
    row = evaluate(student, teacher, keep=keep(tmp_path / "student"), teacher_answers=theirs[:10], **options)
    own = read_answers(tmp_path / "student" / "answers.jsonl", 10, QUESTIONS * 3)
    divergences = [
        answer_divergences(
            student,
            teacher,
            [Sample(q.prompt, a) for q, a in zip(questions[:10], said[:10], strict=True)],
            vocabulary=len(TOKENIZER),
            batch_size=3,
        )
        for said in (own, theirs)
    ]
    curve = excess_error(*divergences)
    assert len({len(answer) for answer in own}) > 1  # or the mean over those that reach is not tested
    assert row.excess_error == pytest.approx(curve.at(16), rel=1e-3, abs=1e-3)
    kept = json.loads((tmp_path / "student" / "exposure.json").read_text())
    assert kept["percent"] == pytest.approx(curve.percent, rel=1e-3, abs=1e-3)
    assert kept["student_answers"][0] == 10


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
    assert evaluate(teacher, teacher, seeds=(), greedy=False).kl_to_teacher == 0.0
    alone = evaluate(student, None, seeds=(), greedy=False)
    assert alone.kl_to_teacher is None and alone.perplexity == pytest.approx(row.perplexity)


def test_a_reading_is_kept_of_every_reference(pair, tmp_path):
    asked = [samples()[0], replace(samples()[1], response=()), *samples()[2:]]
    row = evaluate(*pair, samples=asked, seeds=(), greedy=False, keep=keep(tmp_path))
    kept = answers(tmp_path / "references.jsonl")
    assert [record["index"] for record in kept] == [0, 2, 3]
    assert [record["tokens"] for record in kept] == [len(asked[index].response) for index in (0, 2, 3)]
    tokens = sum(record["tokens"] for record in kept)
    assert row.kl_to_teacher == pytest.approx(sum(record["kl"] for record in kept) / tokens)
    assert row.perplexity == pytest.approx(math.exp(sum(record["nll"] for record in kept) / tokens))
    alone = evaluate(*pair, samples=[asked[2]], references=[REFERENCES[2]], seeds=(), greedy=False)
    assert alone.kl_to_teacher * kept[1]["tokens"] == pytest.approx(kept[1]["kl"], rel=1e-4)


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
    greedy, sampled = "greedy answers", "sampled answers, seeds 1"
    assert told == [
        (greedy, 0, 8), (greedy, 3, 8), (greedy, 3, 8), (greedy, 4, 8),
        (sampled, 4, 8), (sampled, 7, 8), (sampled, 7, 8), (sampled, 8, 8),
    ]  # fmt: skip
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
    positions = pair[0].config.max_position_embeddings
    with pytest.raises(
        ValueError, match=rf"may have {positions + 5} tokens, and the models have {positions} positions"
    ):
        evaluate(*pair, max_new_tokens=positions + 5 - max(len(sample.prompt) for sample in samples()))
    with pytest.raises(ValueError, match="no prompt leaves room"):
        evaluate(*pair, max_length=1)


def test_a_second_evaluation_keeps_off_a_folder_that_is_in_use(tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_text('{"prompt": "Hi", "completion": "Ho"}\n')
    request = Request(data=str(tmp_path / "data.jsonl"))
    with alone(tmp_path / "out" / ".lock"), pytest.raises(ValueError, match="another evaluation is at work"):
        commands.evaluate("none", None, request, tmp_path / "out", Console())
    with alone(tmp_path / "out" / ".lock"), pytest.raises(ValueError, match="another judge is at work"):
        monkeypatch.setattr(judging, "pair_folders", lambda *_, **__: [])
        folder = Evaluated(tmp_path)
        judge_folders("none", folder, folder, JudgeRequest(), tmp_path / "out", Console())


def test_results_file(tmp_path):
    row = EvaluationRow("teacher", 7, 24.5, 23.25, 0.5, 0.0, math.inf, 310.0)
    path = tmp_path / "run" / "results.json"
    write_results(
        path,
        [row],
        seeds=(10, 20),
        seconds=1.5,
        peak_memory_bytes=peak_memory_bytes(),
        sets=[SetRecord("dolly", "1-abc", 500, "data/dolly/test.jsonl")],
        template="alpaca",
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
    assert read["sets"][0] == {
        "name": "dolly",
        "version": "1-abc",
        "records": 500,
        "source": "data/dolly/test.jsonl",
    }
    assert read["template"] == "alpaca"
    assert read["git"] == git_hash()
    assert {"redistill", "torch", "transformers", "rouge-score", "python"} <= read["versions"].keys()
    assert read["versions"]["torch"] == torch.__version__
    assert 50e6 < read["peak_memory_bytes"] < 1e12
    assert [each.name for each in path.parent.iterdir()] == ["results.json"]
