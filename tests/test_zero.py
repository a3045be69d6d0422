"""DeepSpeed's ZeRO-2 and ZeRO-3 in two processes over gloo: the loss curve, the checkpoint and the student of one."""

from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from test_ranks import OTHER, alone, assert_same_files, run_in_two
from test_trainer import assert_same_curve, curve

from redistill.checkpoint import latest

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


FOUR, TWICE_TWO = {"batch": 4, "steps": 4}, {"batch": 2, "accumulate": 2, "steps": 4}
AUTO = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


def under_zero(stage, recipe, **training):
    engine: dict[str, object] = dict.fromkeys(AUTO, "auto")
    # Otherwise DeepSpeed leaves whole what is small.
    more = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    engine["zero_optimization"] = {"stage": stage} | more
    # accelerate takes a run that is told to use the CPU for one without DeepSpeed.
    return recipe | {"training": {"deepspeed": engine, "use_cpu": False} | training}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process and two; the folders by name."""
    root = tmp_path_factory.mktemp("zero")
    alone(root / "alone"), alone(root / "alone-tied", tied=True)
    later = {"resume": str(root / "alone/checkpoint-2"), "term_at": 3}
    in_step = {"rollout": {"gather": False}}
    todo = [
        {"folder": "zero2", "recipe": under_zero(2, TWICE_TWO)},
        {"folder": "zero2-stopped", "recipe": under_zero(2, FOUR), **later},
        {"folder": "zero3-tied", "recipe": under_zero(3, TWICE_TWO, **OTHER), "tied": True},
        {"folder": "zero3-in-step", "recipe": under_zero(3, FOUR | in_step)},
        {"folder": "zero3-stopped", "recipe": under_zero(3, FOUR), **later},
        {"folder": "zero2-spoilt", "recipe": under_zero(2, FOUR | {"steps": 2}), "spoil_at": 1},
        {"folder": "zero3-spoilt", "recipe": under_zero(3, FOUR | {"steps": 2}), "spoil_at": 2},
    ]
    return run_in_two(root, todo)


@pytest.mark.parametrize(
    ("name", "one"), [("zero2", "alone"), ("zero3-tied", "alone-tied"), ("zero3-in-step", "alone")]
)
def test_two_processes_give_the_curve_the_checkpoint_and_the_student_of_one(runs, name, one):
    assert_same_curve(curve(runs / name), curve(runs / one))
    assert_same_files(runs / name / "checkpoint-4", runs / one / "checkpoint-4")
    student, last = load_file(runs / name / "student/model.safetensors"), runs / name / "checkpoint-4"
    for key, value in load_file(last / "model.safetensors").items():
        assert torch.equal(value, student[key])


@pytest.mark.parametrize("name", ["zero2-stopped", "zero3-stopped"])
def test_one_goes_on_from_two_that_went_on_from_one_and_were_stopped(runs, tmp_path, name):
    stopped = latest(runs / name)
    assert stopped is not None and stopped.name == "checkpoint-3"
    assert_same_curve(curve(runs / name), curve(runs / "alone")[2:3])
    alone(tmp_path, resume=str(stopped))
    assert_same_curve(curve(tmp_path), curve(runs / "alone")[3:])
    assert_same_files(tmp_path / "checkpoint-4", runs / "alone" / "checkpoint-4")


@pytest.mark.parametrize("name", ["zero2-spoilt", "zero3-spoilt"])
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(runs, name):
    records = curve(runs / name)
    assert [record["skipped"] for record in records] == ([1, 1] if name.startswith("zero2") else [0, 1])
    before = load_file(runs / "alone" / "checkpoint-2" / "model.safetensors")
    after = load_file(runs / name / "checkpoint-2" / "model.safetensors")
    assert any(not torch.equal(value, after[key]) for key, value in before.items())
