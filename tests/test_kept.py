"""Measuring that was killed goes on; what was made under other settings is never mixed in."""

import json

import pytest
import torch
from test_evaluation import REFERENCES, TOKENIZER, evaluate, keep, samples, still, without_seconds
from tiny import EOS_ID, tiny_llama

from redistill.evaluation import answers as answers_module
from redistill.evaluation.kept import KeptLines, fingerprint, settings_path
from redistill.generate import generate
from redistill.sampling import Sampling


@pytest.fixture(scope="module")
def pair():
    return tiny_llama(len(TOKENIZER), layers=1, seed=1), tiny_llama(len(TOKENIZER), layers=2, seed=2)


class Killed(Exception):
    pass


def test_a_killed_run_asks_only_what_is_missing_and_gives_the_same_row(pair, tmp_path, monkeypatch):
    theirs = generate(
        pair[1], [s.prompt for s in samples()], limits=[6] * 4, sampling=Sampling(), eos=frozenset({EOS_ID}),
        generator=torch.Generator().manual_seed(10), batch_size=4,
    )  # fmt: skip
    whole = evaluate(*pair, keep=keep(tmp_path / "whole"), teacher_answers=theirs)
    place = tmp_path / "broken" / "answers.jsonl"
    asked = []

    def dies_at_the_third(*args, **kwargs):
        if len(asked) == 3:
            raise Killed
        asked.append(len(args[1]))
        return generate(*args, **kwargs)

    monkeypatch.setattr(answers_module, "generate", dies_at_the_third)
    with pytest.raises(Killed):
        evaluate(*pair, keep=keep(tmp_path / "broken"), teacher_answers=theirs)
    assert asked == [3, 1, 3]  # 4 greedy answers, then the first batch of 8 sampled ones
    kept = place.read_bytes().splitlines(keepends=True)
    assert len(kept) == 7
    # The kill fell into a line: two answers of the last batch are lost, one of them half there.
    place.write_bytes(b"".join(kept[:5]) + kept[5][:40])
    asked.clear()
    monkeypatch.setattr(
        answers_module, "generate", lambda *a, **k: asked.append(len(a[1])) or generate(*a, **k)
    )
    row = evaluate(*pair, keep=keep(tmp_path / "broken"), teacher_answers=theirs)
    assert asked == [3, 3, 2]  # the unfinished batch as a whole, then those never asked
    assert still(row) == still(whole)
    assert row.excess_error is None and row.tokens_per_second > 0  # answers of 6 tokens do not reach 16
    for kind in ("answers", "references", "exposure"):
        ended, unbroken = (without_seconds(tmp_path / run / f"{kind}.jsonl") for run in ("broken", "whole"))
        assert ended == unbroken
    asked.clear()
    assert evaluate(*pair, keep=keep(tmp_path / "broken"), teacher_answers=theirs) == row
    assert not asked


OTHERWISE = {
    "model": {},
    "version": {"version": "1-1"},
    "template": {"template": "chat"},
    "temperature": {"temperature": 0.5},
    "limits": {"max_new_tokens": 5},
    "prompts": {"samples": samples()[:2], "references": REFERENCES[:2]},
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_answers_of_other_settings_are_refused_by_name_or_deleted(pair, tmp_path, what):
    student, _ = pair
    once = {"seeds": (10,), "greedy": False}
    evaluate(student, None, keep=keep(tmp_path), **once)
    before = (tmp_path / "answers.jsonl").read_bytes()
    changed = dict(OTHERWISE[what])
    beside = {name: changed.pop(name) for name in ("version", "template") if name in changed}
    model = tiny_llama(len(TOKENIZER), layers=1, seed=9) if what == "model" else student
    with pytest.raises(ValueError, match=rf"answers\.jsonl .*\(.*\b{what}\b.*\).*--anew"):
        evaluate(model, None, keep=keep(tmp_path, **beside), **(once | changed))
    assert (tmp_path / "answers.jsonl").read_bytes() == before
    evaluate(model, None, keep=keep(tmp_path, **beside, on_other="anew"), **(once | changed))
    evaluate(model, None, keep=keep(tmp_path / "fresh", **beside), **(once | changed))
    assert without_seconds(tmp_path / "answers.jsonl") == without_seconds(
        tmp_path / "fresh" / "answers.jsonl"
    )


def test_lines_without_settings_are_not_taken_for_ours(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"index": 0}\n')
    with pytest.raises(ValueError, match=r"no readable answers\.settings\.json"):
        KeptLines(path, {}, lambda record: record["index"])
    lines = KeptLines(path, {"a": (1, 2)}, lambda record: record["index"], on_other="anew")
    lines.append([{"index": 1}, {"index": 0}])
    lines.append([{"index": 0, "again": True}, {"index": 2}])
    lines.sort(lambda record: record["index"])
    again = KeptLines(path, {"a": [1, 2]}, lambda record: record["index"])
    assert again.records == [{"index": 0}, {"index": 1}, {"index": 2}] and again.holds([0, 2])
    beside = json.loads(settings_path(path).read_text())
    assert beside["settings"] == {"a": [1, 2]} and beside["versions"]["torch"] == torch.__version__
    path.write_bytes(path.read_bytes().replace(b"}\n", b"}", 3))  # nothing ends with a line break
    assert KeptLines(path, {"a": [1, 2]}, lambda record: record["index"]).records == []


def test_a_fingerprint_changes_with_a_training_step_only(pair):
    student, teacher = pair
    model = tiny_llama(len(TOKENIZER), layers=1, seed=1)
    assert fingerprint(model) == fingerprint(student) != fingerprint(teacher)
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert fingerprint(model) != fingerprint(student)
    assert fingerprint(student.to(torch.bfloat16)) != fingerprint(student.to(torch.float32))
