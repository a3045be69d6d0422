"""SeqKD's data: the teacher's answers are written once, survive a kill, and are never another's."""

import json

import pytest
from test_trainer import recipe, samples
from tiny import EOS_ID, tiny_llama, tiny_tokenizer

import redistill.teacher_answers as module
from redistill.config import Config
from redistill.teacher_answers import with_teacher_answers

TOKENIZER = tiny_tokenizer()
TEACHER = tiny_llama(len(TOKENIZER), layers=1, seed=2)


def config(tmp_path, **data):
    tree = recipe(tmp_path).model_dump()
    tree["data"] |= {
        "responses": "teacher",
        "responses_path": str(tmp_path / "kept" / "answers.jsonl"),
        **data,
    }
    return Config.model_validate(tree)


def answered(settings, count=10, teacher=TEACHER):
    size = len(TOKENIZER)
    return with_teacher_answers(samples(count), teacher, settings, eos=frozenset({EOS_ID}), vocabulary=size)


def test_answers_are_the_teachers_written_once_and_go_on_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 3)
    settings = config(tmp_path)
    whole = answered(settings)
    given = samples(10)
    assert [s.prompt for s in whole] == [s.prompt for s in given]
    assert [s.response for s in whole] != [s.response for s in given]
    assert all(0 < len(s.response) <= 12 for s in whole)
    path = tmp_path / "kept" / "answers.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 11
    path.write_text("".join(lines[:5]) + lines[5][:7])
    assert answered(settings) == whole and path.read_text() == "".join(lines)
    monkeypatch.setattr(module, "generate", None)
    assert answered(settings) == whole


def test_the_answers_of_another_teacher_or_to_other_prompts_are_refused(tmp_path):
    settings = config(tmp_path)
    answered(settings)
    other = tiny_llama(len(TOKENIZER), layers=1, seed=3)
    for call in (
        lambda: answered(settings, teacher=other),
        lambda: answered(settings, count=9),
        lambda: answered(config(tmp_path, responses_seed=11)),
    ):
        with pytest.raises(ValueError, match=r"answers\.jsonl holds the answers of another teacher"):
            call()


def test_without_a_path_they_lie_in_the_cache_under_a_name_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("REDISTILL_CACHE", str(tmp_path / "cache"))
    answered(config(tmp_path, responses_path=None))
    answered(config(tmp_path, responses_path=None), count=9)
    kept = sorted((tmp_path / "cache" / "teacher-answers").glob("*.jsonl"))
    assert [len(path.read_text().splitlines()) for path in kept] in ([10, 11], [11, 10])
    assert all(json.loads(path.read_text().splitlines()[0])["key"] == path.stem for path in kept)
