"""lm-evaluation-harness on a task of our own: the same scores as redistill's own forward gives."""

import json
import random
import statistics
import sys
from functools import partial

import numpy as np
import pytest
import torch
from tiny import save_tiny

from redistill.evaluation import tasks
from redistill.loading import load_model, load_tokenizer
from redistill.models import add_lora, head_of, hidden_states
from redistill.settings import LoraSettings

WORDS = ("the lazy dog", "Paris", "an apple", "the old river", "quick", "three stairs in the morning")
RECORDS = 8


@pytest.fixture
def harness(monkeypatch):
    """The harness without its fourteen thousand tasks: reading their names takes seconds."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra lm-eval)")
    import lm_eval.tasks

    small = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)


@pytest.fixture
def adapter(tmp_path):
    """A folder with an adapter only, its base model beside it, and both in one for comparison."""
    base = save_tiny(tmp_path / "models").student
    wrapped = add_lora(load_model(base), LoraSettings(r=4, target_modules=("q_proj", "v_proj")))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(tmp_path / "adapter")
    load_tokenizer(base).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def likelihoods(model, tokenizer, question: str, choices: list[str]) -> list[float]:
    """log p(choice | question) by redistill's own way through the model, one choice at a time."""
    head, found = head_of(model, len(tokenizer)), []
    for choice in choices:
        prompt, whole = (tokenizer.encode(text) for text in (question, f"{question} {choice}"))
        assert whole[: len(prompt)] == prompt
        ids = torch.tensor([whole])
        select = torch.arange(len(prompt) - 1, len(whole) - 1)
        with torch.no_grad():
            rows = head.logits(hidden_states(model, ids, select)).log_softmax(-1)
        found.append(float(rows.gather(-1, torch.tensor(whole[len(prompt) :])[:, None]).sum()))
    return found


def write_task(folder, records: list[dict], **more) -> None:
    folder.mkdir(exist_ok=True)
    data = folder / "rivers.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    task = {
        "task": "rivers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1.5},
    }
    (folder / "rivers.yaml").write_text(json.dumps(task | more), encoding="utf-8")  # JSON is YAML


@pytest.mark.usefixtures("harness")
def test_scores_are_those_of_the_merged_model(adapter, tmp_path):
    """Five of eight answers are called right where the model agrees, so the accuracy is known beforehand."""
    model, tokenizer = load_model(adapter), load_tokenizer(adapter)
    plain = load_model(tmp_path / "models" / "student")
    draw = random.Random(0)
    records, normalised, moved = [], [], 0
    for number in range(RECORDS):
        question, choices = f"Which is number {number}?", draw.sample(WORDS, 4)
        prompt = f"Question: {question}\nAnswer:"
        read = likelihoods(model, tokenizer, prompt, choices)
        moved += read != pytest.approx(likelihoods(plain, tokenizer, prompt, choices), abs=1e-3)
        best, other = sorted(range(4), key=lambda place: -read[place])[:2]
        answer = best if number < 5 else other
        records.append({"question": question, "choices": choices, "answer": answer})
        per_character = [value / len(choice) for value, choice in zip(read, choices, strict=True)]
        normalised.append(per_character.index(max(per_character)) == answer)
    assert moved == RECORDS  # the adapter matters
    write_task(tmp_path / "tasks", records)
    options = {"batch_size": 3, "device": "cpu", "dtype": "float32", "include_path": tmp_path / "tasks"}
    found = tasks.run_tasks(adapter, ["rivers", "rivers"], limit=None, **options)
    assert [(each.task, each.metric) for each in found] == [("rivers", "acc"), ("rivers", "acc_norm")]
    assert [(each.version, each.samples, each.shots) for each in found] == [("1.5", RECORDS, 0)] * 2
    assert [each.value for each in found] == [5 / 8, statistics.fmean(normalised)]
    assert found[0].stderr == pytest.approx(statistics.stdev([1] * 5 + [0] * 3) / RECORDS**0.5)
    few = tasks.run_tasks(adapter, ["rivers"], limit=4, **options)
    assert (few[0].value, few[0].samples, few[0].stderr) == (1.0, 4, 0.0)


@pytest.mark.usefixtures("harness")
def test_the_command_line_runs_tasks_alone_and_keeps_them(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from redistill.cli import app

    student = save_tiny(tmp_path / "models").student
    records = [{"question": f"Number {n}?", "choices": list(WORDS[:4]), "answer": n % 4} for n in range(8)]
    write_task(tmp_path / "tasks", records)
    monkeypatch.chdir(tmp_path)
    asked = ["evaluate", str(student), "--tasks", "rivers", "--include-path", "tasks", "--limit", "6"]
    ended = CliRunner().invoke(app, [*asked, "--output", "out"], catch_exceptions=False)
    assert ended.exit_code == 0 and "rivers" in ended.stdout and "acc_norm" in ended.stdout
    kept = json.loads((tmp_path / "out" / "tasks.json").read_text())
    direct = tasks.run_tasks(
        student,
        ["rivers"],
        limit=6,
        batch_size=8,
        device="cpu",
        dtype="float32",
        include_path=tmp_path / "tasks",
    )
    assert [score["value"] for score in kept["tasks"]] == [score.value for score in direct]
    assert (
        kept["limit"] == 6
        and kept["lm_eval"][0].isdigit()
        and not (tmp_path / "out" / "results.json").exists()
    )


@pytest.mark.usefixtures("harness")
def test_shots_are_shown_and_random_states_are_left(tmp_path):
    """The harness's own way in, which probes the machine besides, gives the same with solved examples."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    folder = save_tiny(tmp_path / "models").teacher
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    draw = random.Random(1)
    records = [
        {
            "question": f"Which is number {number}?",
            "choices": draw.sample(WORDS, 4),
            "answer": draw.randrange(4),
        }
        for number in range(3 * RECORDS)
    ]
    # The mean likelihood of the right choice would do; perplexity is the harness's name for a number that moves.
    likelihood = {"output_type": "loglikelihood", "doc_to_target": "{{choices[answer]}}"}
    metric = {"metric_list": [{"metric": "perplexity"}]}
    write_task(tmp_path / "tasks", records, fewshot_split="test", **likelihood, **metric)
    options = {"limit": RECORDS, "batch_size": 4}
    random.random(), np.random.rand(), torch.rand(1)  # so that the states are not those of a fresh seed
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()

    def scored(**more):
        return tasks.score_tasks(
            model, tokenizer, ["rivers"], include_path=tmp_path / "tasks", **options, **more
        )

    (bare,), (shown,) = scored(), scored(num_fewshot=3)
    assert scored(num_fewshot=3) == [shown]
    assert before[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(before[2], torch.get_rng_state())
    assert (bare.shots, shown.shots, shown.metric) == (0, 3, "perplexity")
    with torch.random.fork_rng():
        theirs = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
            tasks=["rivers"],
            task_manager=lm_eval.tasks.TaskManager(include_path=tmp_path / "tasks"),
            num_fewshot=3,
            limit=RECORDS,
            bootstrap_iters=0,
        )
    assert shown.value == theirs["results"]["rivers"]["perplexity,none"]
    assert shown.value != pytest.approx(bare.value, rel=1e-3)


@pytest.mark.usefixtures("harness")
def test_what_cannot_be_run_is_said_in_a_sentence(tmp_path):
    write_task(tmp_path / "tasks", [{"question": "?", "choices": ["a", "b"], "answer": 0}])
    options = {"limit": 2, "batch_size": 2, "device": "cpu", "dtype": "float32"}
    own = options | {"include_path": tmp_path / "tasks"}
    # The name of the model leads nowhere: tasks are looked at first.
    with pytest.raises(ValueError, match=r"has no task 'river': did you mean rivers\?"):
        tasks.run_tasks("./none", ["rivers", "river"], **own)
    with pytest.raises(ValueError, match=r"has no task 'qqqq': `lm-eval ls tasks` lists them"):
        tasks.run_tasks("./none", ["qqqq"], **own)
    with pytest.raises(ValueError, match="no task is named"):
        tasks.run_tasks("./none", [], **own)
    with pytest.raises(ValueError, match=r"there is no folder .*missing"):
        tasks.run_tasks("./none", ["rivers"], **options, include_path=tmp_path / "missing")
    with pytest.raises(ValueError, match="limit is 0: give 1 or more"):
        tasks.run_tasks("./none", ["rivers"], **own | {"limit": 0})
    model = save_tiny(tmp_path / "models").student
    with pytest.raises(ValueError, match="the device 'nowhere' cannot be used"):
        tasks.run_tasks(model, ["rivers"], **own | {"device": "nowhere"})
    (tmp_path / "tasks" / "rivers.jsonl").unlink()
    with pytest.raises(ValueError, match=r"the data of rivers cannot be had: .* task file"):
        tasks.run_tasks(model, ["rivers"], **own)


def test_without_the_extra_the_line_to_type_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r'pip install "redistill\[lm-eval\]"'):
        tasks.run_tasks("./none", ["arc_easy"], limit=None, batch_size=1, device="cpu", dtype="float32")
