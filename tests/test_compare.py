"""`redistill compare` as a user runs it: trains, measures, tests, goes on where it stopped, says what failed."""

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import save_tiny

from redistill.compare.jobs import shares
from redistill.compare.plan import read_plan
from redistill.compare.table import Line, cells, notes, to_markdown
from redistill.config import ConfigError

RECIPE = """
student: {{model_name_or_path: {student}}}
teacher: {{model_name_or_path: {teacher}}}
data: {{path: {data}, template: plain, max_prompt_length: 64}}
rollout: {{max_completion_length: 8}}
objective: {{chunk_size: 64, span: {{chunker: windows}}}}
training: {{per_device_train_batch_size: 4, learning_rate: 1.0e-3, use_cpu: true, save_steps: 100}}
"""
PLAN = """
recipe: recipe.yaml
methods: [kd, mine]
define:
  mine: {{from: mgsr, settings: {{rollout.lmbda: 1.0, objective.span.chunker: windows}}}}
budget: {{steps: 2}}
seeds: [1, 2]
evaluation: {{path: {data}, seeds: [10, 20], max_new_tokens: 8, limit: 6}}
"""


@pytest.fixture
def folder(tmp_path):
    folders = save_tiny(tmp_path)
    data = tmp_path / "data.jsonl"
    words = ["river", "park", "fox", "dog", "morning", "answer", "question", "apple", "stairs", "children"]
    records = [
        {"prompt": f"What is the {a}?", "completion": f" The {a} is near the {b}."}
        for a in words
        for b in words[:3]
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    places = {"student": folders.student, "teacher": folders.teacher, "data": data}
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(**places))
    (tmp_path / "plan.yaml").write_text(PLAN.format(**places))
    return tmp_path


COMMAND = (sys.executable, "-m", "redistill", "compare", "plan.yaml", "--output", "out", "--jobs", "2")


def compare(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(COMMAND, cwd=folder, capture_output=True, text=True, check=False, timeout=500)


def test_a_whole_comparison_and_its_resumption(folder):
    # A run that cannot start fails alone, and is tried again by the next command.
    blocked = folder / "out" / "runs" / "mine" / "seed-2"
    blocked.mkdir(parents=True)
    (blocked / "recipe.yaml").write_text("student: {other: 1}\n")
    (blocked / "checkpoint-1").mkdir()
    first = compare(folder)
    assert first.returncode == 1 and "mine (1 failed)" in first.stdout, first.stdout + first.stderr
    (blocked / "recipe.yaml").unlink()
    (blocked / "checkpoint-1").rmdir()
    untouched = folder / "out" / "runs" / "kd" / "seed-1" / "run.json"
    before = untouched.stat().st_mtime_ns
    second = compare(folder)
    assert second.returncode == 0, second.stdout + second.stderr
    assert untouched.stat().st_mtime_ns == before

    record = json.loads((folder / "out" / "table.json").read_text())
    lines = {line["method"]: line for line in record["lines"]}
    assert list(lines) == ["teacher", "start", "kd", "mine"]
    assert lines["teacher"]["kl_to_teacher"] == 0 and lines["start"]["kl_to_teacher"] > 0
    for name in ("kd", "mine"):
        line = lines[name]
        assert (line["runs"], line["failed"], line["steps"]) == (2, 0, 2)
        assert (
            line["train_seconds"] > 0 and line["peak_memory_bytes"] > 1e8 and line["rougeL_std"] is not None
        )
        assert (line["rougeL_p"] is None) == (name == "kd") == (line["kl_p"] is None)
    kl = lines["mine"]["kl_difference"]
    assert lines["mine"]["kl_low"] <= kl <= lines["mine"]["kl_high"]
    assert record["comparisons_corrected_for"] == 1 and record["baseline"] == "kd"
    rows = list(csv.DictReader((folder / "out" / "table.csv").open()))
    assert [row["method"] for row in rows] == list(lines)
    markdown = (folder / "out" / "table.md").read_text()
    assert "| teacher |" in markdown and "**" in markdown and "Fewer than three training seeds" in markdown
    assert "mine" in second.stdout

    # Results of another budget must not pass for these; nothing is trained to find that out.
    plan = folder / "plan.yaml"
    plan.write_text(plan.read_text().replace("steps: 2", "steps: 3"))
    third = compare(folder)
    assert third.returncode == 2 and "holds results under other settings" in third.stderr


def test_whatever_ends_a_comparison_lets_its_runs_save_and_the_same_command_goes_on(folder):
    plan = folder / "plan.yaml"
    plan.write_text(plan.read_text().replace("steps: 2", "steps: 1000").replace("[kd, mine]", "[kd, sft]"))
    runs = [folder / "out" / "runs" / method / "seed-1" for method in ("kd", "sft")]
    saved = [0, 0]
    for how, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        parent = subprocess.Popen(COMMAND, cwd=folder, stdout=subprocess.PIPE, text=True)
        await_that(lambda saved=saved: all(steps(run) > n + 1 for run, n in zip(runs, saved, strict=True)))
        parent.send_signal(how)
        said, _ = parent.communicate(timeout=200)
        assert parent.returncode == code, said
        # Each saved behind the step it was in, and wrote no step more.
        await_that(lambda: all((run / f"checkpoint-{steps(run)}").is_dir() for run in runs))
        assert all(n < steps(run) < 1000 for run, n in zip(runs, saved, strict=True))
        assert not any((run / "run.json").exists() for run in runs)
        saved = [steps(run) for run in runs]


def steps(run: Path) -> int:
    log = run / "steps.jsonl"
    return log.read_text().count("\n") if log.is_file() else 0


def await_that(happens, seconds: float = 200):
    deadline = time.time() + seconds
    while not happens():
        assert time.time() < deadline
        time.sleep(0.1)


def test_jobs_share_cores_and_devices_as_far_as_the_user_has_not_said():
    assert shares(1, {"A": "a"}, cores=8, devices=4) == [{"A": "a"}]
    three = shares(3, {}, cores=8, devices=2)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in three] == ["0", "1", "0"]
    assert {each["OMP_NUM_THREADS"] for each in three} == {"2"}
    said = shares(2, {"OMP_NUM_THREADS": "5", "CUDA_VISIBLE_DEVICES": "3,GPU-ab"}, cores=1, devices=2)
    assert [(each["OMP_NUM_THREADS"], each["CUDA_VISIBLE_DEVICES"]) for each in said] == [
        ("5", "3"), ("5", "GPU-ab"),
    ]  # fmt: skip
    assert shares(2, {"CUDA_VISIBLE_DEVICES": ""}, cores=1, devices=0)[1] == {
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def test_seconds_and_several_jobs_are_warned_of(folder):
    assert not read_plan(folder / "plan.yaml", jobs=2).warnings()
    plan = folder / "plan.yaml"
    plan.write_text(plan.read_text().replace("steps: 2", "seconds: 2.0"))
    assert "as many neighbours" in read_plan(plan, jobs=2).warnings()[0]
    assert not read_plan(plan).warnings()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            ("budget: {steps: 2}", "budget: {steps: 2, seconds: 3.0}"),
            "one of steps, student_tokens and seconds",
        ),
        (("[kd, mine]", "[kd, sfd]"), "no method 'sfd'"),
        (("[kd, mine]", "[kd, kd]"), "methods names one twice"),
        (("seeds: [1, 2]", "seeds: [1, 2]\nbaseline: gkd"), "baseline gkd is none"),
        (("seeds: [10, 20]", "sets: [dolly], seeds: [10, 20]"), "sets or path"),
        (("budget:", "budgets:"), r"plan.yaml:\d+: budgets is not a setting"),
        (("rollout.lmbda: 1.0", "rollout.lmbda: 2.0"), "rollout.lmbda"),
    ],
)
def test_a_wrong_plan_is_refused_before_anything_runs(folder, change, says):
    path = folder / "plan.yaml"
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises((ConfigError, ValueError), match=says):
        read_plan(path)


def test_marks_bold_and_notes(folder):
    plan = read_plan(folder / "plan.yaml")
    kd = Line("", "kd", 2, rougeL_mean=20.0, rougeL_std=0.5, kl_to_teacher=1.0)
    better = replace(kd, method="sft", rougeL_mean=22.0, kl_to_teacher=1.5, rougeL_difference=2.0, rougeL_p=0.01,
                     kl_difference=0.5, kl_p=0.001)  # fmt: skip
    unclear = replace(kd, method="mine", rougeL_mean=19.0, rougeL_difference=-1.0, rougeL_p=0.3, kl_difference=-0.2,
                      kl_p=0.2, kl_to_teacher=0.8, rougeL_needs_prompts=4.0)  # fmt: skip
    teacher = Line("", "teacher", 1, rougeL_mean=30.0, kl_to_teacher=0.0)
    lines = [teacher, kd, better, unclear]
    assert cells(lines, better)[1] == ("22.00 ± 0.50 ▲", True)
    assert cells(lines, better)[3] == ("1.500 ▼", False)
    assert cells(lines, unclear)[3] == ("0.800", True)
    assert cells(lines, teacher)[1] == ("30.00", False) and cells(lines, teacher)[4] == ("-", False)
    assert (
        "1 ROUGE-L differences are not significant; the nearest (mine) would need about 4.0 times"
        in notes(plan, lines)
    )
    assert "**22.00 ± 0.50 ▲**" in to_markdown(plan, lines)
