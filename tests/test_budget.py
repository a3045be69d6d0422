"""Budgets of tokens and seconds: where a run ends, what its learning rate follows, and how it goes on."""

import pytest
import torch
from test_trainer import assert_same_curve, curve, recipe, train_and_die_at, trainer
from torch.optim.lr_scheduler import LambdaLR, StepLR
from transformers import get_scheduler

from redistill.budget import SCHEDULE_STEPS, Spending, follow_spending
from redistill.checkpoint import latest
from redistill.config import BudgetSettings, Config, ConfigError, load_config
from redistill.methods import find_method
from redistill.runlog import read

PLAIN = {"rollout": {"lmbda": 0.0, "replay_ratio": 0.0, "schedule": "constant", "schedule_start": 0.0}}


def bounded(folder, **budget):
    config = recipe(folder, **PLAIN)
    training = {k: v for k, v in config.training.items() if k != "max_steps"}
    training |= {"lr_scheduler_type": "linear", "warmup_steps": 0.2, "eval_strategy": "no"}
    return Config.model_validate({**config.model_dump(), "training": training, "budget": budget})


def test_the_nearer_bound_counts():
    spending = Spending(BudgetSettings(seconds=10.0, student_tokens=100))
    spending.add([{"seconds": 1.0, "student_tokens": 30}, {"seconds": 1.0, "student_tokens": 30}])
    assert spending.fraction() == pytest.approx(0.6)
    spending.add([{"seconds": 90.0, "student_tokens": 0}])
    assert spending.fraction() == 1.0
    assert Spending(BudgetSettings()).fraction() == 0.0 and not Spending(BudgetSettings()).bounded


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_a_schedule_follows_what_is_spent(kind):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    made = get_scheduler(kind, optimizer, SCHEDULE_STEPS // 10, SCHEDULE_STEPS)
    wanted = [made.lr_lambdas[0](round(share * SCHEDULE_STEPS)) for share in (0.0, 0.05, 0.1, 0.5, 1.0)]
    spent = iter([0.0, 0.05, 0.1, 0.5, 1.0])
    follow_spending(made, lambda: next(spent))
    got = []
    for _ in wanted:
        optimizer.step()
        made.step()
        got.append(made.get_last_lr()[0])
    assert got == pytest.approx(wanted)
    with pytest.raises(ValueError, match="StepLR cannot follow a budget"):
        follow_spending(StepLR(optimizer, 1), lambda: 0.0)
    assert isinstance(made, LambdaLR)


def test_a_run_ends_when_its_tokens_are_spent_and_a_stopped_one_goes_on_to_the_same_end(tmp_path):
    whole = trainer(bounded(tmp_path / "whole", student_tokens=700))
    whole.train()
    records = list(read(tmp_path / "whole" / "steps.jsonl"))
    tokens = [record["student_tokens"] for record in records]
    assert sum(tokens) >= 700 > sum(tokens[:-1])
    assert records[-1]["progress"] == 1.0 and whole.ends_at(len(records)) and not whole.ends_at(2)
    assert latest(tmp_path / "whole").name == f"checkpoint-{len(records)}"
    rates = [e["learning_rate"] for e in whole.state.log_history if "learning_rate" in e]
    before = [0.0, *(record["progress"] for record in records[:-1])]
    wanted = [0.01 * min(share / 0.2, (1 - share) / 0.8) for share in before]
    assert rates == pytest.approx(wanted, abs=2e-6)

    first = trainer(bounded(tmp_path / "cut", student_tokens=700))
    train_and_die_at(first, 3)
    second = trainer(bounded(tmp_path / "cut", student_tokens=700))
    second.train(resume_from_checkpoint=str(latest(tmp_path / "cut")))
    assert_same_curve(curve(tmp_path / "cut"), curve(tmp_path / "whole"))


def test_seconds_end_a_run_too(tmp_path):
    run = trainer(bounded(tmp_path, seconds=1.0))
    run.train()
    seconds = [record["seconds"] for record in read(tmp_path / "steps.jsonl")]
    assert sum(seconds) >= 1.0 > sum(seconds[:-1])


@pytest.mark.parametrize("extra", [["training.max_steps=3"], ["training.warmup_steps=4"]])
def test_a_budget_that_contradicts_the_recipe_is_refused(tmp_path, extra):
    path = tmp_path / "r.yaml"
    path.write_text("student: {model_name_or_path: s}\nteacher: {model_name_or_path: t}\ndata: {path: d}\n")
    assert load_config(path, ["budget.seconds=5.0"]).budget.seconds == 5.0
    with pytest.raises(ConfigError, match=r"leave out training.max_steps|as a share below 1"):
        load_config(path, ["budget.seconds=5.0", *extra])


def as_method(config, name):
    tree = config.model_dump()
    for setting, value in find_method(name).settings.items():
        section = tree
        *path, last = setting.split(".")
        for part in path:
            section = section[part]
        section[last] = value
    return Config.model_validate(tree)


def test_fine_tuning_never_reads_the_teacher(tmp_path, monkeypatch):
    run = trainer(as_method(recipe(tmp_path, steps=2, training={"eval_strategy": "no"}), "sft"))
    monkeypatch.setattr(run.teacher.model, "forward", None)
    monkeypatch.setattr(run.teacher.model.model, "forward", None)
    run.train()
    records = list(read(tmp_path / "steps.jsonl"))
    assert len(records) == 2 and all(r["sft"] > 0 and "kl" not in r and "token" not in r for r in records)


def test_minillm_trains_on_mixed_answers_with_advantages(tmp_path):
    config = as_method(recipe(tmp_path, steps=3, training={"eval_strategy": "no"}), "minillm-lm")
    run = trainer(config)
    run.train()
    records = list(read(tmp_path / "steps.jsonl"))
    assert all(r["student_samples"] == 8 and r["sft"] > 0 and r["token"] > 0 for r in records)
    assert all(abs(r["policy"]) > 1e-6 and r["seconds_policy"] > 0 for r in records)
    answer = next(iter(run._drawn.student.values()))
    assert len(answer.behaviour) == len(answer.advantages) == len(answer.response)
    assert max(answer.behaviour) < 0


def test_distillm_takes_more_old_answers_the_longer_it_runs(tmp_path):
    config = as_method(recipe(tmp_path, steps=12, training={"eval_strategy": "no"}), "distillm")
    config = config.model_copy(
        update={"rollout": config.rollout.model_copy(update={"schedule": "constant", "per": "sample"})}
    )
    run = trainer(config)
    run.train()
    replayed = [record["replayed"] for record in read(tmp_path / "steps.jsonl")]
    assert replayed[0] == 0 and sum(replayed[6:]) > sum(replayed[:6]) and replayed[-1] >= 5
