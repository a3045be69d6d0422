"""The command line as a user runs it: a process of its own, a tiny model made on the spot, real files.

Most of the processes are forks of one that has imported torch, which takes a new one as long as all the rest.
"""

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import yaml
from forks import STREAMS, Lives
from tiny import save_tiny

COMMAND = [sys.executable, "-m", "redistill"]
RECORDS = [
    {
        "instruction": f"Name a colour of the {thing}.",
        "input": "",
        "output": f"The {thing} is often {colour}.",
    }
    for thing, colour in zip(
        ["sky", "grass", "river", "fox", "apple", "snow", "night", "sun", "leaf", "stone", "sea", "rose"],
        ["blue", "green", "brown", "red", "red", "white", "black", "yellow", "green", "grey", "blue", "pink"],
        strict=True,
    )
]


@cache
def lives():
    return Lives().__enter__()  # its end is this process's


def redistill(*args, cwd, check=True):
    life = lives().start(args, Path(cwd))
    code = life.wait(300)
    done = subprocess.CompletedProcess(args, code, *map(life.text, STREAMS))
    assert not check or done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    save_tiny(folder)
    lines = "".join(json.dumps(r) + "\n" for r in RECORDS)
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text(lines)
    (folder / "data" / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS[:4]))
    recipe = {
        "student": {"model_name_or_path": "student"},
        "teacher": {"model_name_or_path": "teacher"},
        "data": {"path": "data", "eval_split": "test"},
        "rollout": {"lmbda": 0.5, "max_completion_length": 16},
        "training": {"max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 2, "use_cpu": True},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_train_then_evaluate_then_revise(place):
    said = redistill(
        "train", "recipe.yaml", "--output", "out", "--set", "training.logging_steps=1", cwd=place
    )
    assert "out/student" in said.stdout
    steps = [json.loads(line) for line in (place / "out" / "steps.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == [1, 2, 3, 4] and {"sft", "token", "kl", "revision"} & set(steps[0])
    assert (place / "out" / "student" / "model.safetensors").is_file()

    weights = (place / "out" / "student" / "model.safetensors").read_bytes()
    said = redistill(
        "train", "recipe.yaml", "--output", "out", "--set", "training.logging_steps=1", cwd=place
    )
    assert (
        "was finished" in said.stdout and len((place / "out" / "steps.jsonl").read_text().splitlines()) == 4
    )
    assert (place / "out" / "student" / "model.safetensors").read_bytes() == weights

    said = redistill(
        "evaluate", "out/student", "--teacher", "teacher", "--data", "data", "--seeds", "1,2",
        "--max-new-tokens", "8", "--output", "scores", cwd=place,
    )  # fmt: skip
    results = json.loads((place / "scores" / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["teacher (teacher)", "student"]
    wanted = {"parameters", "rougeL_greedy", "rougeL_mean", "rougeL_std", "kl_to_teacher", "perplexity"}
    assert wanted | {"tokens_per_second"} <= set(results["rows"][0])
    answers = (place / "scores" / "answers-student.jsonl").read_text().splitlines()
    assert len(answers) == 4 * 3 and "ROUGE" in said.stdout

    said = redistill(
        "revise",
        "Name a colour.",
        "--student",
        "student",
        "--teacher",
        "teacher",
        "--max-new-tokens",
        "6",
        cwd=place,
    )
    assert "KL" in said.stdout


def test_a_recipe_with_an_evaluation_section_ends_in_a_table(place):
    said = redistill(
        "train", "recipe.yaml", "--output", "measured", "--set", "training.max_steps=2",
        "--set", "evaluation={seeds: [1, 2], max_new_tokens: 6}", cwd=place,
    )  # fmt: skip
    results = json.loads((place / "measured" / "results.json").read_text())
    rows = results["rows"]
    assert [row["name"] for row in rows] == ["teacher", "student before", "student after"]
    assert "student after" in said.stdout
    assert rows[1]["kl_to_teacher"] != rows[2]["kl_to_teacher"]
    assert [each["metric"] for each in results["differences"]] == ["rougeL_mean", "kl_to_teacher"]
    gain = results["differences"][0]
    assert gain["difference"] == pytest.approx(rows[2]["rougeL_mean"] - rows[1]["rougeL_mean"], abs=1e-9)
    assert gain["low"] <= gain["difference"] <= gain["high"]
    redistill("report", "measured", cwd=place)
    assert "After 2 steps" in (place / "measured" / "report.html").read_text(encoding="utf-8")


def test_ctrl_c_saves_and_the_same_command_goes_on(place):
    args = ["train", "recipe.yaml", "--output", "stopped", "--set", "training.max_steps=400",
            "--set", "training.save_steps=1000"]  # fmt: skip
    process = subprocess.Popen(
        [*COMMAND, *args], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    log = place / "stopped" / "steps.jsonl"
    deadline = time.time() + 240
    while not (log.is_file() and log.read_text().count("\n") >= 2) and time.time() < deadline:
        assert process.poll() is None
        time.sleep(0.1)
    second = redistill(*args, cwd=place, check=False)
    assert second.returncode == 2 and "another process is at work in stopped" in second.stderr
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said and "goes on from there" in said
    step = int(next((place / "stopped").glob("checkpoint-*")).name.split("-")[1])
    assert step < 400
    args[5] = f"training.max_steps={step + 2}"
    said = redistill(*args, cwd=place, check=False)
    assert said.returncode == 2 and "training.max_steps" in said.stderr and "--resume" in said.stderr
    said = redistill(*args, "--resume", cwd=place)
    assert f"checkpoint-{step}" in said.stdout
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, step + 3))


def test_prune_and_train_what_it_made_with_lora(place):
    said = redistill("prune", "teacher", "short", "--keep", "1", "--data", "data", cwd=place)
    assert "Kept 1 layers" in said.stdout
    redistill(
        "train", "recipe.yaml", "--output", "adapter", "--set", "student.model_name_or_path=short",
        "--set", "student.lora={r: 4, lora_alpha: 8}", "--set", "training.max_steps=2",
        "--set", "training.gradient_checkpointing=true", "--set", "data.streaming=true",
        "--set", "data.shuffle_buffer_size=5", cwd=place,
    )  # fmt: skip
    assert (place / "adapter" / "student" / "adapter_model.safetensors").is_file()
    assert json.loads((place / "adapter/checkpoint-2/redistill.json").read_text())["stream"]["counted"] == 5
    assert "not empty" in redistill("prune", "teacher", "short", "--keep", "1", cwd=place, check=False).stderr


BAD = {
    "unknown key": (["--set", "rollout.lambda=1"], ["rollout.lambda", "lmbda"]),
    "out of range": (["--set", "rollout.lmbda=2"], ["rollout.lmbda"]),
    "no such data": (["--set", "data.path=nowhere.jsonl"], ["nowhere.jsonl"]),
    "no such model": (["--set", "teacher.model_name_or_path=./nowhere"], ["nowhere"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_one_clear_sentence(place, name):
    args, words = BAD[name]
    ended = redistill("train", "recipe.yaml", "--output", "never", *args, cwd=place, check=False)
    assert ended.returncode == 2 and ended.stderr.startswith("redistill: ")
    assert all(word in ended.stderr for word in words), ended.stderr


def test_bad_rows_stop_before_training_and_are_named(place):
    lines = (place / "data" / "train.jsonl").read_text().splitlines()
    lines[3] = '{"instruction": "broken'
    lines[5] = json.dumps({"instruction": "Empty?", "output": ""})
    (place / "bad.jsonl").write_text("\n".join(lines))
    args = [
        "train",
        "recipe.yaml",
        "--set",
        "data.path=bad.jsonl",
        "--set",
        "data.eval_path=data",
        "--output",
    ]
    ended = redistill(*args, "bad", cwd=place, check=False)
    assert ended.returncode == 2 and "bad.jsonl:4" in ended.stderr and "max_bad_share" in ended.stderr
    more = ["--set", "data.max_bad_share=0.5", "--set", "training.max_steps=1"]
    said = redistill(*args, "bad", *more, cwd=place)
    assert "bad.jsonl:4" in said.stderr + said.stdout


def test_another_tokenizer_is_refused_with_the_reason(place):
    folder = place / "foreign"
    folder.mkdir()
    for path in Path(place / "student").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    ended = redistill(
        "train",
        "recipe.yaml",
        "--set",
        "student.model_name_or_path=foreign",
        "--output",
        "no",
        cwd=place,
        check=False,
    )
    assert ended.returncode == 2 and "different tokenizers" in ended.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_leaves_the_last_checkpoint_whole(place, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        ended = redistill("train", "recipe.yaml", "--output", small / "run", "--set",
                          "training.save_steps=1", cwd=place, check=False)  # fmt: skip
        assert ended.returncode == 74 and "disk is full" in ended.stderr, ended.stderr
        for found in (small / "run").glob("checkpoint-*"):
            assert (found / "redistill.json").is_file() and (found / "model.safetensors").is_file()
    finally:
        subprocess.run(["umount", str(small)], check=False)
