"""`redistill compare` as a user runs it: trains, measures, tests, goes on where it stopped, says what failed."""

import csv
import io
import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from tiny import save_tiny

from redistill.compare import child, command, jobs, runs
from redistill.compare.jobs import shares
from redistill.compare.lines import Line, _pair
from redistill.compare.plan import read_plan
from redistill.compare.runs import Run, begin
from redistill.compare.search import CompareSearch
from redistill.compare.table import cells, notes, to_markdown
from redistill.config import ConfigError
from redistill.evaluation.suites import SUITES

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
evaluation: {{path: {data}, seeds: [10, 20], temperature: 0.7, top_p: 0.9, max_new_tokens: 8, limit: 6}}
judge: {{model: {teacher}, limit: 3, dtype: float32}}
"""
SEARCH = """
search:
  trials: 2
  settings: {training.learning_rate: [1.0e-3, 1.0e+30]}
  own: {mine: {training.learning_rate: [1.0e-3], training.optim: [nothing, adamw_torch]}}
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
    assert not [*folder.glob("out/runs/*/*/checkpoint-*")], "several times the size of all students"

    made = json.loads((untouched.parent / "evaluation" / "answers-student.settings.json").read_text())[
        "settings"
    ]
    assert (made["temperature"], made["top_p"]) == (0.7, 0.9)
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
        assert line["exact_match"] == 0 and line["exact_p"] is None
    (verdict,) = record["judge"]
    assert (verdict["method"], verdict["seeds"]) == ("mine", 2)
    # Two training seeds of three prompts, each with a greedy and two sampled answers.
    assert verdict["wins"] + verdict["ties"] + verdict["losses"] == 18
    assert verdict["low"] <= verdict["difference"] <= verdict["high"]
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


def in_this_process(jobs, console, ended, **_):
    """In the place of `run_jobs`: no import for each job."""
    for job in jobs:
        console.print(f"{job.name}: begins")
        try:
            child.work(job.folder, console)
        except (ValueError, RuntimeError) as problem:
            ended(job, str(problem))
        else:
            ended(job, "")


def test_sets_and_samples_added_later_are_measured_on_the_students_that_are_there(folder, monkeypatch):
    monkeypatch.setattr(runs, "run_jobs", in_this_process)
    monkeypatch.setattr(child, "_watch_parent", threading.Event)
    for name in ("vicuna", "dolly"):
        records = [{"instruction": f"Say {name} {n}.", "output": f"{n}"} for n in range(SUITES[name].records)]
        write_lines(folder / "sets" / name / "test.jsonl", records)
    plan = folder / "plan.yaml"
    text = plan.read_text().replace(
        f"path: {folder / 'data.jsonl'}", f"data_root: {folder / 'sets'}, sets: [vicuna]"
    )
    text = (
        text.replace("[kd, mine]", "[kd]")
        .replace("seeds: [1, 2]", "seeds: [1]")
        .replace("limit: 6", "limit: 3, greedy: false, max_prompt_length: 9")
    )
    text = text.partition("judge:")[0]

    def asked(sets: str) -> tuple[list[str], str]:
        plan.write_text(text.replace("sets: [vicuna]", f"sets: {sets}"))
        console = Console(file=io.StringIO(), width=200)
        assert command.compare(plan, folder / "out", console)
        lines = json.loads((folder / "out" / "table.json").read_text())["lines"]
        return [line["set"] for line in lines if line["method"] == "kd"], console.file.getvalue()

    assert asked("[vicuna]")[0] == ["vicuna"]
    run = folder / "out" / "runs" / "kd" / "seed-1"
    assert json.loads((run / "asked.json").read_text())["request"]["max_prompt_length"] == 9
    student, noted = run / "student" / "model.safetensors", json.loads((run / "run.json").read_text())
    answers = run / "evaluation" / "vicuna" / "answers-student.jsonl"
    seen = [each.stat().st_mtime_ns for each in (student, answers)]
    sets, said = asked("[dolly, vicuna]")
    assert sets == ["dolly", "vicuna"] and "kd, seed 1: begins" in said
    assert [each.stat().st_mtime_ns for each in (student, answers)] == seen
    assert json.loads((run / "run.json").read_text()) == noted, "what training took is what it took"
    # Settings that did not exist when a run was made are taken to have been as they are by default.
    earlier = json.loads((run / "asked.json").read_text())
    del earlier["request"]["system"], earlier["recipe"]["revision"]["accept"]
    (run / "asked.json").write_text(json.dumps(earlier))
    # One of them again: nothing is done, and nothing lost.
    for name in ("dolly", "vicuna"):
        sets, said = asked(f"[{name}]")
        assert sets == [name] and "begins" not in said
    # More sampled answers and greedy ones: those that are there stay, in their files too.
    before = [json.loads(line) for line in answers.open()]
    text = text.replace("seeds: [10, 20]", "seeds: [10, 20, 30]").replace("greedy: false", "greedy: true")
    assert "kd, seed 1: begins" in asked("[vicuna]")[1]
    after = [json.loads(line) for line in answers.open()]
    assert {line["seed"] for line in after} == {"greedy", 10, 20, 30} and len(after) == 2 * len(before)
    assert [line for line in after if line["seed"] in (10, 20)] == before
    # Exposure bias, where none was measured; once it is, on as many prompts.
    curve = answers.with_name("exposure-student.json")
    assert not curve.exists()
    text = text.replace("limit: 3", "limit: 3, exposure_prompts: 2")
    assert "kd, seed 1: begins" in asked("[vicuna]")[1] and json.loads(curve.read_text())["percent"]
    assert "begins" not in asked("[vicuna]")[1]
    with pytest.raises(ValueError, match="holds results under other settings"):
        text = text.replace("exposure_prompts: 2", "exposure_prompts: 3")
        asked("[vicuna]")
    text = text.replace("exposure_prompts: 3", "exposure_prompts: 2")
    assert student.stat().st_mtime_ns == seen[0]
    with pytest.raises(ValueError, match="holds results under other settings"):
        text = text.replace("seeds: [10, 20, 30]", "seeds: [10, 30]")
        asked("[vicuna]")
    text = text.replace("seeds: [10, 30]", "seeds: [10, 20, 30]").replace("limit: 3", "limit: 4")
    with pytest.raises(ValueError, match="holds results under other settings"):
        asked("[vicuna]")


def test_a_search_chooses_on_held_out_data_and_bad_trials_are_only_bad(folder, monkeypatch):
    monkeypatch.setattr(runs, "run_jobs", in_this_process)
    monkeypatch.setattr(child, "_watch_parent", threading.Event)
    plan = with_search(folder)
    alone = plan.read_text()
    plan.write_text(alone.replace("[kd, mine]", "[kd]").partition("  own:")[0])
    console = Console(file=io.StringIO(), width=200)
    assert command.compare(plan, folder / "out", console), console.file.getvalue()
    search = folder / "out" / "search"
    chosen = (search / "kd" / "best.json").read_text()
    plan.write_text(alone)
    console = Console(file=io.StringIO(), width=200)
    assert command.compare(plan, folder / "out", console), console.file.getvalue()
    assert "kd, trial" not in console.file.getvalue() and (search / "kd" / "best.json").read_text() == chosen

    record = json.loads((folder / "out" / "table.json").read_text())
    for method, bad in (("kd", "is not a number"), ("mine", "nothing")):
        found = record["search"][method]
        trials = {json.dumps(trial["settings"]): trial for trial in found["trials"]}
        assert len(trials) == found["grid"] == 2
        (best,) = (trial for trial in found["trials"] if trial["value"] is not None)
        (other,) = (trial for trial in found["trials"] if trial["value"] is None)
        assert found["trials"][found["best"]] == best and bad in other["failed"]
        assert best["settings"]["training.learning_rate"] == 1e-3
        recipe = yaml.safe_load((folder / "out" / "runs" / method / "seed-1" / "recipe.yaml").read_text())
        assert recipe["training"]["learning_rate"] == 1e-3 and recipe["training"]["seed"] == 1
        # What it was chosen by: the KL on the held-out references, of a student trained with no seed of the table.
        trial = search / method / f"trial-{found['best'] + 1}"
        read = [json.loads(line) for line in (trial / "evaluation" / "references-student.jsonl").open()]
        assert len(read) == 4
        kl = sum(each["kl"] for each in read) / sum(each["tokens"] for each in read)
        assert best["value"] == pytest.approx(kl)
        assert yaml.safe_load((trial / "recipe.yaml").read_text())["training"]["seed"] == 1000
    assert [line["trials"] for line in record["lines"]] == [None, None, 2, 2]
    assert "- mine: training.learning_rate=0.001" in (folder / "out" / "table.md").read_text()

    # Neither another search nor none may be set beside these results.
    for text in (alone.replace("trials: 2", "trials: 1"), alone.partition("search:")[0]):
        plan.write_text(text)
        with pytest.raises(ValueError, match="holds results under other settings"):
            begin(read_plan(plan), folder / "out", Console())


def with_search(folder: Path) -> Path:
    records = [
        {"prompt": f"Where is the {a}?", "completion": f" In the {a}."}
        for a in ("mill", "barn", "sea", "sky")
    ]
    (folder / "heldout.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe, plan = folder / "recipe.yaml", folder / "plan.yaml"
    recipe.write_text(
        recipe.read_text().replace("data: {", f"data: {{eval_path: {folder / 'heldout.jsonl'}, ")
    )
    plan.write_text(plan.read_text().replace("seeds: [1, 2]", "seeds: [1]") + SEARCH)
    return plan


def test_every_method_draws_as_many_points_and_equal_ones_from_equal_grids():
    settings = {"training.learning_rate": [1e-4, 1e-3, 1e-2], "rollout.lmbda": [0.0, 0.5, 1.0]}
    search = CompareSearch(trials=4, settings=settings, own={"c": {"revision.rounds": [1, 2, 3]}, "d": {
        "training.learning_rate": [1e-3], "rollout.lmbda": [0.0, 1.0]}})  # fmt: skip
    drawn = {name: [json.dumps(point) for point in search.draw(name)] for name in "abcd"}
    assert drawn["a"] == drawn["b"] != drawn["c"]
    assert [len(set(points)) for points in drawn.values()] == [4, 4, 4, 2]
    assert (search.size("c"), search.size("d")) == (27, 2)
    whole = CompareSearch(trials=27, settings=settings, own={"c": {"revision.rounds": [1, 2, 3]}}).draw("c")
    assert len({json.dumps(point) for point in whole}) == 27
    others = [CompareSearch(trials=4, seed=seed, settings=settings).draw("a") for seed in range(5)]
    assert any(each != others[0] for each in others)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("training.optim", "training.seed"), "cannot try training.seed"),
        (("training.optim", "data.limit"), "cannot try data.limit"),
        (("training.optim", "training.optimm"), "training.optimm"),
        (("1.0e+30", "1.0e-3"), "names a value of training.learning_rate twice"),
        (("own: {mine", "own: {mein"), "mein is none of the methods"),
        (("seeds: [1]", "seeds: [1, 1000]"), "the seed 1000"),
    ],
)
def test_a_wrong_search_is_refused_before_anything_runs(folder, change, says):
    path = with_search(folder)
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(ConfigError, match=says):
        read_plan(path)


def test_a_search_needs_held_out_data_that_is_not_the_evaluation(folder):
    plan = with_search(folder)
    recipe = folder / "recipe.yaml"
    whole = recipe.read_text()
    recipe.write_text(whole.replace("heldout.jsonl", "data.jsonl"))
    with pytest.raises(ConfigError, match="6 of 6 evaluation prompts"):
        read_plan(plan)
    recipe.write_text(whole.replace(f"eval_path: {folder / 'heldout.jsonl'}, ", ""))
    with pytest.raises(ConfigError, match=r"data.eval_path or data.eval_split"):
        read_plan(plan)


def test_whatever_ends_a_comparison_lets_its_runs_save_and_the_same_command_goes_on(folder):
    plan = folder / "plan.yaml"
    plan.write_text(plan.read_text().replace("steps: 2", "steps: 1000").replace("[kd, mine]", "[kd, sft]"))
    runs = [folder / "out" / "runs" / method / "seed-1" for method in ("kd", "sft")]
    saved = [0, 0]
    # Tests that run in the background of a script inherit, and would hand on, that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
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


def test_a_full_disk_ends_a_comparison_where_it_would_only_fail_run_after_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text(
        "#!/bin/sh\ncase $4 in *full) exit 74;; *) cat; echo saved > $4/saved;; esac\n"
    )
    (tmp_path / "python").chmod(0o755)
    asked = [jobs.Job(name, tmp_path / name) for name in ("beside", "full", "never")]
    for job in asked:
        job.folder.mkdir()
    console, ended = Console(file=io.StringIO(), width=200), []
    with pytest.raises(OSError, match=r"No space left on device: .*full"):
        jobs.run_jobs(asked, console, lambda *each: ended.append(each), at_once=2)
    assert (tmp_path / "beside" / "saved").is_file() and not ended, "what is under way saves"
    assert "never: begins" not in console.file.getvalue()


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
        (("seeds: [10, 20]", "seeds: [10, 20, 10]"), "evaluation.seeds names one twice"),
        (("rollout.lmbda: 1.0", "data.template: chat"), "mine sets data.template, which all methods share"),
        (("rollout.lmbda: 1.0", "student.dtype: bfloat16"), "mine sets student.dtype"),
        (("rollout.lmbda: 1.0", "training.max_steps: 9"), "mine sets training.max_steps"),
        (("dtype: float32", "dtype: float31"), "judge.dtype"),
    ],
)
def test_a_wrong_plan_is_refused_before_anything_runs(folder, change, says):
    path = folder / "plan.yaml"
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises((ConfigError, ValueError), match=says):
        read_plan(path)


def test_what_all_share_is_not_what_a_method_adapts(folder):
    path = folder / "plan.yaml"
    path.write_text(path.read_text().replace("rollout.lmbda: 1.0", "student.lora: {r: 2}"))
    assert read_plan(path).config("mine", 1).student.lora.r == 2
    path.write_text(path.read_text().replace("mine", "start"))
    with pytest.raises(ConfigError, match="has a row start of its own"):
        read_plan(path)


def test_steps_take_the_place_of_a_recipe_s_own_budget(folder):
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "budget: {seconds: 60}\n")
    config = read_plan(folder / "plan.yaml").config("kd", 1)
    assert config.budget.seconds is None and config.training["max_steps"] == 2


@pytest.fixture
def small(folder, monkeypatch):
    """A comparison of one run in this process: called with changes of its plan, it gives what was said."""
    monkeypatch.setattr(runs, "run_jobs", in_this_process)
    monkeypatch.setattr(child, "_watch_parent", threading.Event)
    plan = folder / "plan.yaml"
    changes = [
        ("[kd, mine]", "[kd]"),
        ("seeds: [1, 2]", "seeds: [1]"),
        ("limit: 6", "greedy: false, limit: 6"),
    ]

    def run(*more: tuple[str, str], judge: bool = False) -> str:
        text = PLAN.format(student=folder / "student", teacher=folder / "teacher", data=folder / "data.jsonl")
        text = text if judge else text.partition("judge:")[0]
        for old, new in (*changes, *more):
            assert old in text
            text = text.replace(old, new)
        plan.write_text(text)
        console = Console(file=io.StringIO(), width=300)
        command.compare(plan, folder / "out", console)
        return console.file.getvalue()

    return run


def table_of(folder):
    return {line["method"]: line for line in json.loads((folder / "out" / "table.json").read_text())["lines"]}


def test_a_student_that_was_lost_in_its_last_step_is_a_failed_run_and_the_table_stays(folder, small):
    wild = "{wild: {from: sft, settings: {training.learning_rate: 1.0e+30}}}"
    said = small(
        ("[kd]", "[kd, wild]"),
        ("define:", f"define: {wild}\nkept:"),
        (
            "kept:\n  mine: {from: mgsr, settings: {rollout.lmbda: 1.0, objective.span.chunker: windows}}\n",
            "",
        ),
    )
    lines = table_of(folder)
    assert lines["kd"]["failed"] == 0 and (lines["wild"]["runs"], lines["wild"]["failed"]) == (0, 1)
    assert "is not a number" in json.loads((folder / "out/runs/wild/seed-1/run.json").read_text())["failed"]
    assert "Nothing was tested against kd" in said


def test_an_output_folder_keeps_to_what_was_asked_of_what(folder, small):
    small()
    data = folder / "data.jsonl"
    before = data.read_text()
    data.write_text(before.replace("What is the river?", "Where is the river?"))
    with pytest.raises(ValueError, match="has changed since this folder was begun"):
        small(("seeds: [1]", "seeds: [1, 2]"))
    data.write_text(before)
    # What is not there is refused before it is noted: without it the folder goes on.
    sets = (f"path: {data}", f"data_root: {folder}, sets: [doly]")
    with pytest.raises(ValueError, match="doly"):
        small(sets)
    assert "begins" not in small()
    # Exposure bias is measured with the first evaluation seed, the teacher's too.
    small(("limit: 6", "limit: 6, exposure_prompts: 2"))
    front = ("seeds: [10, 20]", "seeds: [5, 10, 20]")
    with pytest.raises(ValueError, match="with the evaluation seed 10: name it first"):
        small(("limit: 6", "limit: 6, exposure_prompts: 2"), front)
    behind = ("seeds: [10, 20]", "seeds: [10, 20, 5]")
    assert "kd, seed 1: begins" in small(("limit: 6", "limit: 6, exposure_prompts: 2"), behind)
    # How the start is made belongs to what was asked, though no run's recipe says it.
    (folder / "out").rename(folder / "first")
    recipe = folder / "recipe.yaml"
    pruned = recipe.read_text().replace(
        f"student: {{model_name_or_path: {folder / 'student'}}}", "student: {prune: {keep: 2}}"
    )
    recipe.write_text(pruned)
    small()
    recipe.write_text(pruned.replace("keep: 2", "keep: 1"))
    with pytest.raises(ValueError, match="start holds results under other settings"):
        small(("seeds: [1]", "seeds: [1, 2]"))


def test_a_judge_is_looked_for_first_and_never_takes_the_table_away(folder, small, monkeypatch):
    both = (("[kd]", "[kd, mine]"),)
    teacher = f"model: {folder / 'teacher'}"
    with pytest.raises((ValueError, OSError), match="teachr"):
        small(*both, (teacher, teacher.replace("teacher", "teachr")), judge=True)
    assert not (folder / "out" / "runs").exists(), "nothing is trained, and nothing noted"

    def fails(*_, **__):
        raise RuntimeError("no memory for the judge")

    with monkeypatch.context() as patch:
        patch.setattr(command, "judge_methods", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            small(*both, judge=True)
    assert table_of(folder)["mine"]["rougeL_p"] is not None
    said = small(*both, judge=True)
    assert "blind and in both orders" in said and "begins" not in said
    # More answers of the same students: their judgements are made anew.
    assert "blind" in small(*both, ("seeds: [10, 20]", "seeds: [10, 20, 30]"), judge=True)
    (verdict,) = json.loads((folder / "out" / "table.json").read_text())["judge"]
    assert verdict["wins"] + verdict["ties"] + verdict["losses"] == 9


def test_one_prompt_tells_nothing(folder, small):
    said = small(("[kd]", "[kd, mine]"), ("limit: 6", "limit: 1"))
    assert table_of(folder)["mine"]["kl_p"] is None and "it takes two prompts" in said


def test_exact_answers_are_tested_where_there_are_any(tmp_path):
    wrote = {("kd", 1): [0, 1, 0], ("sft", 1): [1, 1, 0], ("kd", 2): [0, 0, 0], ("sft", 2): [1, 0, 0]}
    runs = [Run(method, seed, tmp_path / f"{method}{seed}") for method, seed in wrote]
    for run in runs:
        answers = [
            {"seed": 10, "index": i, "exact_match": e} for i, e in enumerate(wrote[run.method, run.seed])
        ]
        write_lines(run.folder / "evaluation" / "set" / "answers-student.jsonl", answers)
    ours, theirs = _pair(runs, "sft", "kd", "set", "exact")
    assert ours == [[100, 100, 0], [100, 0, 0]] and theirs == [[0, 100, 0], [0, 0, 0]]
    for run in runs:
        answers = [{"seed": 10, "index": 0, "exact_match": 0}]
        write_lines(run.folder / "evaluation" / "set" / "answers-student.jsonl", answers)
    assert _pair(runs, "sft", "kd", "set", "exact") is None


def write_lines(path: Path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_marks_bold_and_notes(folder):
    plan = read_plan(folder / "plan.yaml")
    kd = Line("", "kd", 2, rougeL_mean=20.0, rougeL_std=0.5, kl_to_teacher=1.0)
    better = replace(kd, method="sft", rougeL_mean=22.0, kl_to_teacher=1.5, rougeL_difference=2.0, rougeL_p=0.01,
                     kl_difference=0.5, kl_p=0.001, exact_match=9.0, exact_difference=2.0, exact_p=0.04)  # fmt: skip
    unclear = replace(kd, method="mine", rougeL_mean=19.0, rougeL_difference=-1.0, rougeL_p=0.3, kl_difference=-0.2,
                      kl_p=0.2, kl_to_teacher=0.8, rougeL_needs_prompts=4.0)  # fmt: skip
    teacher = Line("", "teacher", 1, rougeL_mean=30.0, kl_to_teacher=0.0)
    lines = [teacher, kd, better, unclear]
    assert cells(lines, better)[1] == ("22.00 ± 0.50 ▲", True)
    assert cells(lines, better)[3] == ("1.500 ▼", False)
    assert cells(lines, better)[5] == ("9.0 ▲", True)
    assert cells(lines, unclear)[3] == ("0.800", True)
    assert cells(lines, teacher)[1] == ("30.00", False) and cells(lines, teacher)[4] == ("-", False)
    assert (
        "1 ROUGE-L differences are not significant; the nearest (mine) would need about 4.0 times"
        in notes(plan, lines)
    )
    seeds = replace(unclear, method="yours", rougeL_needs_prompts=None, rougeL_needs_seeds=1.5)
    never = replace(unclear, method="theirs", rougeL_needs_prompts=None)
    said = notes(plan, [*lines, seeds, never])
    assert (
        "3 ROUGE-L differences" in said
        and "(yours) would need about 1.5 times as many training seeds" in said
    )
    assert "1 ROUGE-L differences are not significant; no number of prompts" in notes(plan, [kd, never])
    alike = [replace(each, exact_match=0.0) for each in lines]
    assert not any(cells(alike, each)[5][1] for each in alike), "no one leads where all are alike"
    assert "± over training seeds" in notes(plan, lines)
    assert "± over sampling seeds" in notes(plan, [teacher, replace(kd, runs=1)])
    assert "**22.00 ± 0.50 ▲**" in to_markdown(plan, lines, [])
