"""Context distillation: the teacher reads another prompt than the student, before the same response."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import naive_objective
import pytest
import torch
import yaml
from rich.console import Console
from test_cli import RECORDS, redistill
from test_trainer import TOKENIZER, curve, recipe, samples
from tiny import save_tiny, tiny_llama, tiny_qwen2
from vllm_stand_in import serving

from redistill import DistillTrainer
from redistill.batch import Counts, Row, collate
from redistill.caching import cache_teacher
from redistill.chat import prompt_ids, to_sample
from redistill.config import ObjectiveSettings, load_config
from redistill.objective import Objective, batch_loss
from redistill.packing import packs
from redistill.prepare import prepare
from redistill.records import Problem, to_example
from redistill.replay import ReplayBuffer
from redistill.revision import revise_samples
from redistill.rollout import Pair, write
from redistill.run import train
from redistill.runlog import read
from redistill.sample import Example, Message, Sample
from redistill.sampling import Sampling
from redistill.scoring import reference_scores, score
from redistill.settings import RolloutSettings, ServedSettings
from redistill.teachers.local import LocalTeacher
from redistill.teachers.served import ServedTeacher
from redistill.teachers.store import key_of

SIZE = len(TOKENIZER)
ASKED = [Sample((5, 9, 11), (40, 7, 2)), Sample((8,), (300, 90, 91, 2)), Sample((6, 7), (33, 2))]
SHOWN = [(70, 71, 72, 73, 74), (), (60,)]
TOLD = [replace(each, teacher_prompt=own) for each, own in zip(ASKED, SHOWN, strict=True)]
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
READ = (Message("system", "Be brief."), Message("user", "Why?"))
FORMATS = [
    {"text": "All of it."},
    {"prompt": "Why?"},
    {"prompt": "Why?", "completion": "So."},
    {"prompt": TURNS, "completion": [{"role": "assistant", "content": "So."}]},
    {"messages": [*TURNS, {"role": "assistant", "content": "So."}]},
    {"instruction": "Do", "input": "x", "output": "y"},
]


@pytest.mark.parametrize("record", FORMATS, ids="-".join)
def test_it_stands_beside_every_format(record):
    plain = to_example(record, "a:1")
    assert plain == to_example({**record, "teacher_prompt": None}, "a:1") and plain.teacher_prompt is None
    found = to_example({**record, "teacher_prompt": "Think, then: why?"}, "a:1")
    assert found == replace(plain, teacher_prompt="Think, then: why?")
    assert to_example({**record, "hint": "h", "teacher_prompt": "t"}, "a:1", "hint").teacher_prompt == "h"
    if "text" not in record:
        assert to_example({**record, "teacher_prompt": TURNS}, "a:1").teacher_prompt == READ


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (3, 'has a number in "teacher_prompt", not text'),
        (" ", 'has an empty "teacher_prompt"'),
        ([], 'has an empty "teacher_prompt"'),
        (["a"], 'has no "role" and "content" in teacher_prompt[0]'),
        ({"role": "user"}, 'has an object in "teacher_prompt", not text'),
    ],
)
def test_a_wrong_one_makes_a_bad_record(value, what):
    assert to_example({"prompt": "Why?", "teacher_prompt": value}, "a:1") == Problem("a:1", what)


def test_turns_before_a_plain_text_are_refused():
    found = to_example({"text": "All.", "teacher_prompt": TURNS}, "a:1")
    assert found == Problem("a:1", 'has turns in "teacher_prompt" before a plain "text": give text')


LIMITS = {"system": None, "max_prompt_length": 64, "max_completion_length": 32, "on_long_prompt": "drop"}


def test_it_is_written_like_a_prompt_with_a_limit_of_its_own():
    how = {"template": "chat", "tokenizer": TOKENIZER, **LIMITS}
    example = Example("Why?", ("So.",), context="the sky", source="a:1", teacher_prompt="Think twice. " * 20)
    asked = to_sample(replace(example, teacher_prompt=None), **how)
    found = to_sample(example, **how)
    whole = prompt_ids(Example(example.teacher_prompt), TOKENIZER, template="chat", system=None)
    assert found == replace(asked, teacher_prompt=whole) and len(whole) > 64 and not asked.teacher_prompt
    # Before a text there is no turn.
    text = to_sample(Example("", ("So.",), teacher_prompt="Once"), **how)
    assert text.teacher_prompt == tuple(TOKENIZER.encode("Once", add_special_tokens=False))
    reason = to_sample(example, **how, max_teacher_prompt_length=50)
    assert reason == f"the teacher's prompt has {len(whole)} tokens, over data.max_teacher_prompt_length = 50"
    cut = to_sample(example, **{**how, "on_long_prompt": "truncate"}, max_teacher_prompt_length=50)
    assert cut.prompt == asked.prompt and 40 < len(cut.teacher_prompt) <= 50
    assert cut.teacher_prompt[-4:] == whole[-4:], "the template stays whole"


def logits_of(model, sample):
    """The model's own forward, of one sample behind its prompt, alone."""
    ids = torch.tensor([[*sample.prompt, *sample.response]])
    return model(ids).logits[0, len(sample.prompt) - 1 : -1].double()


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2])
def test_loss_and_scores_are_those_of_a_teacher_read_alone_behind_its_prompt(build):
    student, teacher = build(SIZE, seed=1), build(SIZE, hidden=48, seed=2)
    settings = ObjectiveSettings(token_loss="forward_kl", span_weight=2.0)
    spans = [(0, 0, -1), (-1, 0, 0, -1), (-1, -1)]
    rows = [Row(each, True, True, lambda own=own: own) for each, own in zip(TOLD, spans, strict=True)]
    counts = Counts(9.0, 9.0, 2.0)
    # Read in the order of `collate`, which keeps that of one group.
    ours = torch.cat([logits_of(student, each) for each in ASKED])
    alone = [Sample(own or each.prompt, each.response) for each, own in zip(ASKED, SHOWN, strict=True)]
    theirs = torch.cat([logits_of(teacher, each) for each in alone])
    targets = torch.tensor([token for each in ASKED for token in each.response])
    numbers = torch.tensor([0, 0, -1, -1, 3, 3, -1, -1, -1])
    wanted = naive_objective.objective(
        settings, None, ours, theirs, targets, numbers, torch.ones(9, dtype=torch.bool), 9, counts
    )
    losses = []
    for packed in {False, packs(teacher, SIZE)}:
        found = LocalTeacher(teacher, SIZE, packed)
        loss, _ = batch_loss(Objective(settings), student, found, collate(rows, 3), lambda: counts, SIZE)
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
        losses.append(loss.detach())
    assert len(losses) == 2, "packed and padded"
    kl = naive_objective.kl_class(theirs.log_softmax(-1), ours.log_softmax(-1)).sum(-1)
    scores = score(
        student, teacher, TOLD, vocabulary=SIZE, teacher_token="argmax", generator=None, batch_size=2
    )
    torch.testing.assert_close(torch.cat([each.kl for each in scores]).double(), kl, rtol=1e-4, atol=1e-5)
    assert torch.cat([each.teacher_token for each in scores]).equal(theirs.argmax(-1))
    assert reference_scores(student, teacher, TOLD, SIZE, 3)["kl"] == pytest.approx(
        kl.mean().item(), rel=1e-4
    )


class Forgetful:
    """A teacher that reads everything anew in each round."""

    vocabulary, model = SIZE, None

    def __init__(self, teacher):
        self.signal = teacher.signal


def test_a_second_correction_reads_on_behind_it():
    student = tiny_llama(SIZE, seed=1)
    teacher = LocalTeacher(tiny_llama(SIZE, hidden=48, seed=2), SIZE)
    found = [
        revise_samples(
            student, each, told, rounds=2, teacher_token="argmax", sampling=Sampling(0.0), generator=None,
            eos=frozenset({2}), vocabulary=SIZE, max_completion_length=8, batch_size=3,
        )
        for each, told in ((teacher, TOLD), (Forgetful(teacher), TOLD), (teacher, ASKED))
    ]  # fmt: skip
    assert [each.response for each in found[0]] == [each.response for each in found[1]]
    assert [each.response for each in found[0]] != [each.response for each in found[2]]
    assert [len(each.edits) for each in found[0]] == [2, 2, 2]
    assert [each.teacher_prompt for each in found[0]] == SHOWN


def test_a_server_is_asked_behind_it(tmp_path):
    tiny_llama(SIZE, hidden=48, seed=2).save_pretrained(tmp_path)
    with serving(tmp_path, TOKENIZER) as (url, _):
        teacher = ServedTeacher(ServedSettings(url=url, top_k=6), TOKENIZER, SIZE)
        said, plain = teacher.signal(TOLD), teacher.signal([each.for_teacher() for each in TOLD])
    assert said.ids.equal(plain.ids) and said.log_p.equal(plain.log_p)


def test_answers_buffer_and_cache_know_it():
    pair = Pair(tiny_llama(SIZE, seed=1), LocalTeacher(tiny_llama(SIZE, seed=2), SIZE), SIZE, frozenset({2}))
    said = write(pair, TOLD, RolloutSettings(max_completion_length=5), torch.Generator().manual_seed(0))
    assert [each.teacher_prompt for each in said] == SHOWN
    buffer = ReplayBuffer(9)
    buffer.push(said)
    state = json.loads(json.dumps(buffer.state()))
    buffer.load(state)
    assert buffer.draw(3, torch.Generator()) and {*buffer.draw(3, torch.Generator())} == {*said}
    for record in state:
        del record["teacher_prompt"]  # as an earlier redistill wrote it
    buffer.load(state)
    assert {*buffer.draw(3, torch.Generator())} == {replace(each, teacher_prompt=()) for each in said}
    # Stored is what the teacher says, so the key is of what it reads.
    assert [key_of(each) for each in TOLD] == [key_of(each.for_teacher()) for each in TOLD]
    assert [a == b for a, b in zip(map(key_of, TOLD), map(key_of, ASKED), strict=True)] == [
        False,
        True,
        False,
    ]


def trained(folder, change):
    student, teacher = tiny_llama(SIZE, seed=1), tiny_llama(SIZE, hidden=48, seed=2)
    data = [replace(each, teacher_prompt=change(each)) for each in samples(24)]
    DistillTrainer(student, teacher, recipe(folder, steps=3), TOKENIZER, data, data[:4]).train()
    return curve(folder), list(read(folder / "evaluations.jsonl"))


def test_a_run_is_the_same_where_it_is_the_prompt_itself_and_another_where_it_is_not(tmp_path):
    """References, own answers, corrections and the replay buffer; bit for bit."""
    without = trained(tmp_path / "without", lambda _: ())
    assert trained(tmp_path / "same", lambda each: each.prompt) == without
    other, _ = trained(tmp_path / "other", lambda each: (50, 51, *each.prompt))
    assert [step["sft"] for step in other][:1] == [step["sft"] for step in without[0]][:1]
    assert other[0]["kl"] != without[0][0]["kl"]
    asked = recipe(tmp_path / "mixed", rollout={"teacher_mix": 0.2})
    told = [replace(each, teacher_prompt=(50,)) for each in samples(4)]
    with pytest.raises(ValueError, match=r"column teacher_prompt\): set rollout\.teacher_mix to 0"):
        DistillTrainer(tiny_llama(SIZE), tiny_llama(SIZE), asked, TOKENIZER, told)


def test_the_command_line_trains_measures_and_caches_with_it(tmp_path, monkeypatch):
    save_tiny(tmp_path)
    hints = [
        {} if place % 3 == 0 else {"hint": f"Known: {each['output']}"} for place, each in enumerate(RECORDS)
    ]
    told = [{**each, **hint} for each, hint in zip(RECORDS, hints, strict=True)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in told))
    config = {
        "student": {"model_name_or_path": "student"},
        "teacher": {"model_name_or_path": "teacher"},
        "data": {"path": "data.jsonl", "eval_path": "data.jsonl", "teacher_prompt": "hint",
                 "max_prompt_length": 40, "max_teacher_prompt_length": 80},
        "rollout": {"lmbda": 0.0, "max_completion_length": 12},
        "evaluation": {"seeds": [1], "max_new_tokens": 4, "greedy": False},
        "training": {"max_steps": 1, "per_device_train_batch_size": 12, "use_cpu": True},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    redistill("train", "recipe.yaml", "--output", "out", cwd=tmp_path)
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]}
    assert rows["teacher"]["kl_to_teacher"] == 0 < rows["student after"]["kl_to_teacher"]
    shown = [record["prompt"] for record in read(tmp_path / "out" / "answers" / "teacher.jsonl")]
    assert sum("Known: " in prompt for prompt in shown) == 8 and len(shown) == 12
    asked = [record["prompt"] for record in read(tmp_path / "out" / "answers" / "student-after.jsonl")]
    assert not any("Known: " in prompt for prompt in asked)

    monkeypatch.chdir(tmp_path)
    del config["evaluation"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    quiet, cached = Console(quiet=True), "teacher.cache=cache"
    cache_teacher(load_config("recipe.yaml"), Path("cache"), quiet, k=384, batch_size=6)
    train(load_config("recipe.yaml", [cached]), Path("cached"), quiet)
    live, stored = (curve(tmp_path / each)[0] for each in ("out", "cached"))
    assert stored["kl"] == pytest.approx(live["kl"], rel=2e-3)
    with pytest.raises(ValueError, match=r"lacks 16 of the 24 samples, the first from data\.jsonl:2: run"):
        prepare(load_config("recipe.yaml", [cached, "data.teacher_prompt=instruction"]))
    with pytest.raises(
        ValueError, match=r"data\.jsonl has the column 'hnit' that data\.teacher_prompt names"
    ):
        prepare(load_config("recipe.yaml", ["data.teacher_prompt=hnit"]))


def test_a_sample_without_one_is_what_the_teacher_reads():
    assert ASKED[0].for_teacher() is ASKED[0]
    assert asdict(TOLD[0].for_teacher()) == {**asdict(ASKED[0]), "prompt": SHOWN[0]}
