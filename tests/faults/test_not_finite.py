"""Numbers that are no numbers: a step is left out, and a lost run ends with the checkpoint to go on from."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from runs import STEPS, lines
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer


def teacher_without(place, word: str) -> str:
    """A teacher that turns to NaN wherever it reads a token of `word`."""
    name = f"teacher-without-{word.strip()}"
    shutil.copytree(place / "teacher", place / name, dirs_exist_ok=True)
    weights = load_file(place / name / "model.safetensors")
    weights["model.embed_tokens.weight"][tiny_tokenizer().encode(word)] = float("nan")
    save_file(weights, place / name / "model.safetensors", {"format": "pt"})
    return name


CASES = {
    "the student's loss": {"training.learning_rate": 1.0e30},
    "the clip network": {"objective.dac.learning_rate": 1.0e30},
    "the teacher": {"teacher.model_name_or_path": "teacher-without-the"},
}


@pytest.mark.parametrize("name", CASES)
def test_an_explosion_is_left_out_or_ends_the_run(place, lives, tell, name):
    teacher_without(place, " the")
    settings = {**CASES[name], "training.save_steps": 1, "training.warmup_steps": 3}
    run = place / f"explodes-{name.split()[-1]}"
    life = lives.train(run.name, place, settings)
    code = life.wait()
    assert code in (0, 1) and "Traceback" not in life.said(), life.said()
    done = lines(run / "steps.jsonl")
    if code == 0:
        assert done[-1]["step"] == STEPS
        good = run / "student"
    else:
        assert "not finite in 3 steps in a row" in life.said(), life.said()
        assert [each["skipped"] for each in done[-4:]] in ([0, 1, 2, 3], [1, 2, 3])
        named = re.search(r"Last good checkpoint: (\S+)\.", life.said())
        if named is None:
            assert "none yet" in life.said()
            return
        good = place / named[1]
    assert all(bool(torch.isfinite(each).all()) for each in load_file(good / "model.safetensors").values())
    tell(f"not finite, {name}: {'finished' if code == 0 else 'stopped'} after step {done[-1]['step']}, "
         f"{done[-1]['skipped']} steps left out, weights finite")  # fmt: skip


def test_a_step_now_and_then_is_left_out(place, lives):
    name = teacher_without(place, "§")
    odd = json.dumps({"instruction": "Name a § of the law.", "output": "The first."}, ensure_ascii=False)
    (place / "odd.jsonl").write_text((place / "train.jsonl").read_text() + odd + "\n")
    settings = {
        "data.path": "odd.jsonl",
        "teacher.model_name_or_path": name,
        "training.max_steps": 12,
        "rollout.lmbda": 0.0,
        "rollout.schedule": "constant",
        "training.eval_strategy": "no",
    }
    life = lives.train("now-and-then", place, settings)
    assert life.wait() == 0, life.said()
    done = lines(place / "now-and-then" / "steps.jsonl")
    assert done[-1]["skipped"] == 3, "once in each of the three epochs"
    assert all(
        bool(torch.isfinite(each).all())
        for each in load_file(place / "now-and-then/student/model.safetensors").values()
    )
