"""Two real processes over gloo: the loss curve, the checkpoint and the student of one process; a rank that dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from ranks_child import measured
from rich.console import Console
from safetensors.torch import load_file
from test_stream import streamed
from test_trainer import TOKENIZER, assert_same_curve, curve, recipe, trainer
from tiny import save_tiny, tiny_llama, tiny_qwen2

from redistill.checkpoint import latest
from redistill.config import load_config
from redistill.run import train
from redistill.runlog import read

HERE = Path(__file__).parent
CONFIGS = sorted((HERE.parent / "recipes" / "accelerate").glob("*.yaml"))


def launch(*arguments):
    """A command in two processes, as torchrun starts them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [*launcher, *map(str, arguments)]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run_in_two(root, asked):
    """Runs in two processes, as `ranks_child.py` reads them; gives the folder that they lie in."""
    asked = [{**each, "folder": str(root / each["folder"])} for each in asked]
    process = launch(HERE / "ranks_child.py", json.dumps(asked))
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said[-6000:]
    return root


# A number that is drawn within rounding of the next token ends the likeness: with the seed 3 one of these does.
OTHER = {"seed": 5}
MEASURED = {"batch": 4, "steps": 1}


def alone(folder, *, tied=False, resume=None):
    """In this process: one batch of eight in place of two of four; untied, of streamed data."""
    student = tiny_qwen2(len(TOKENIZER), seed=1) if tied else tiny_llama(len(TOKENIZER), seed=1)
    run = trainer(recipe(folder, steps=4, training=OTHER if tied else {}), student)
    if not tied:
        run.train_dataset = streamed(run.train_dataset)
    run.train(resume_from_checkpoint=resume)


def assert_same_files(one, other):
    """The same names; weights, clip network and optimizer states that are the same up to rounding."""
    names = [{file.name for file in folder.iterdir()} for folder in (one, other)]
    assert {name for name in names[0] ^ names[1] if not name.startswith("rng_state")} == set()
    for name in ("model.safetensors", "redistill.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert torch.allclose(value.double(), b[key].double(), rtol=2e-3, atol=2e-4), (name, key)
    a, b = (json.loads((folder / "redistill.json").read_text()) for folder in (one, other))
    assert [kept["response"] for kept in a["buffer"]] == [kept["response"] for kept in b["buffer"]]
    a, b = (torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in (one, other))
    assert a.keys() == b.keys()
    for key, state in a.items():
        for name, value in state.items():
            assert torch.allclose(value, b[key][name], rtol=2e-2, atol=1e-5), (key, name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process and two, each also from the other's checkpoint; the folders by name."""
    root = tmp_path_factory.mktemp("ranks")
    alone(root / "alone"), alone(root / "alone-tied", tied=True)
    four, sharded = {"batch": 4, "steps": 4}, {"training": {"fsdp": True}}
    two = {"batch": 2, "accumulate": 2, "steps": 4}
    fitted = {"token_weight": 0.0, "span_weight": 0.0, "dac": {}}
    hollow = {"batch": 1, "steps": 2, "objective": fitted, "rollout": {"schedule": "constant"}}
    no_eval = {"eval_strategy": "no"}
    go_on = {"resume": str(root / "alone/checkpoint-2"), "term_at": 3, "streamed": True}
    asked = [
        {"folder": "ddp", "recipe": four, "streamed": True},
        {"folder": "fsdp2-tied", "recipe": two | {"training": {"fsdp": True} | OTHER}, "tied": True},
        {"folder": "ddp-stopped", "recipe": four} | go_on,
        {"folder": "fsdp2", "recipe": four | sharded} | go_on,
        {
            "folder": "fsdp2-in-step",
            "recipe": four | sharded | {"rollout": {"gather": False}},
            "streamed": True,
        },
        {
            "folder": "measured",
            "recipe": MEASURED | sharded | {"rollout": {"gather": False}},
            "measured": True,
        },
        {"folder": "spoilt", "recipe": four | {"steps": 2, "training": no_eval}, "spoil_at": 1},
        {"folder": "spoilt-fsdp2", "recipe": four | {"steps": 2} | sharded, "spoil_at": 2},
        {"folder": "hollow", "recipe": hollow | {"training": no_eval}, "holes": True},
        {"folder": "hollow-fsdp2", "recipe": hollow | sharded, "holes": True},
    ]
    return run_in_two(root, asked)


@pytest.mark.parametrize(
    ("name", "one"), [("ddp", "alone"), ("fsdp2-in-step", "alone"), ("fsdp2-tied", "alone-tied")]
)
def test_two_processes_give_the_curve_the_checkpoint_and_the_student_of_one(runs, name, one):
    assert any(record["replayed"] for record in curve(runs / one))
    assert any("share_revised" in record for record in curve(runs / one))
    assert_same_curve(curve(runs / name), curve(runs / one))
    evaluations = [list(read(runs / each / "evaluations.jsonl")) for each in (name, one)]
    for a, b in zip(*evaluations, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    seen, alike = ([list(read(runs / each / "views.jsonl")) for each in (name, one)]), 0
    assert all([view["step"] for view in views] == [1, 2, 3, 4] for views in seen)
    for a, b in zip(*seen, strict=True):
        assert a["positions"] and all(0 <= value < 99 for value in a["kl"])
        # The first rank sees its own part of the step only.
        if (a["prompt"], a["response"]) == (b["prompt"], b["response"]):
            assert a["kl"] == pytest.approx(b["kl"], abs=2e-3)
            alike += 1
    assert alike
    assert_same_files(runs / name / "checkpoint-4", runs / one / "checkpoint-4")
    student, last = load_file(runs / name / "student/model.safetensors"), runs / name / "checkpoint-4"
    assert all(
        torch.equal(value, student[key]) for key, value in load_file(last / "model.safetensors").items()
    )


def test_a_run_is_measured_before_and_after_as_in_one_process(runs, tmp_path):
    (tmp_path / "run").mkdir()
    measured(tmp_path / "run", MEASURED | {"batch": 8})
    found, wanted = (
        json.loads((folder / "results.json").read_text())["rows"]
        for folder in (runs / "measured", tmp_path / "run")
    )
    assert [row["name"] for row in found] == ["teacher", "student before", "student after"]
    for one, other in zip(found, wanted, strict=True):
        for name in ("perplexity", "kl_to_teacher", "rougeL_greedy", "mean_tokens"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), (one["name"], name)


@pytest.mark.parametrize("name", ["ddp-stopped", "fsdp2"])
def test_one_goes_on_from_two_that_went_on_from_one_and_were_stopped(runs, tmp_path, name):
    stopped = latest(runs / name)
    assert stopped is not None and stopped.name == "checkpoint-3", "rank 1 alone was told to stop"
    assert_same_curve(curve(runs / name), curve(runs / "alone")[2:3])
    alone(tmp_path, resume=str(stopped))
    assert_same_curve(curve(tmp_path), curve(runs / "alone")[3:])
    assert_same_files(tmp_path / "checkpoint-4", runs / "alone" / "checkpoint-4")


@pytest.mark.parametrize("name", ["hollow", "hollow-fsdp2"])
def test_a_rank_with_nothing_to_train_on_waits_for_the_others(runs, name):
    records = curve(runs / name)
    assert len(records) == 2 and all(r["sft_tokens"] == r["student_tokens"] > 0 for r in records)


def child_of(launcher, rank):
    """The process that a launcher has started as a rank."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            child = f"\nPPid:\t{launcher}\n" in status.read_text()
            if child and b"\0RANK=%d\0" % rank in (status.parent / "environ").read_bytes():
                return int(status.parent.name)
        except OSError:
            continue
    raise AssertionError(f"no rank {rank}")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc to find the rank")
def test_a_rank_is_killed_the_others_stop_with_one_message_and_the_run_goes_on(tmp_path):
    models = save_tiny(tmp_path)
    lines = [{"prompt": f"Name the number {n}.", "completion": f"It is {n}."} for n in range(24)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sections = recipe(tmp_path / "run", batch=2, steps=12).model_dump(exclude={"data", "evaluation"})
    sections |= {"student": {"model_name_or_path": str(models.student)}, "data": {"path": str(tmp_path)}}
    sections["teacher"] = {"model_name_or_path": str(models.teacher)}
    sections["training"] |= {"eval_strategy": "no"}
    sections["rollout"] |= {"schedule": "constant"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(sections))))
    process = launch("-m", "redistill", "train", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    while latest(tmp_path / "run") is None:
        assert process.poll() is None, process.communicate()[1][-4000:]
        time.sleep(0.05)
    os.kill(child_of(process.pid, 1), signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    spoken = [line for line in said.splitlines() if line.startswith("redistill: ")]
    assert len(spoken) == 1 and "run the same command again" in spoken[0]
    outcome = train(load_config(tmp_path / "recipe.yaml"), tmp_path / "run", Console(quiet=True))
    assert outcome.finished and (outcome.student / "model.safetensors").is_file()
    assert [record["step"] for record in read(tmp_path / "run" / "steps.jsonl")] == list(range(1, 13))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_accelerate_reads_the_packaged_configs(path):
    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0 and config.num_processes > 1
    kinds = {"fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type == kinds.get(path.stem, "MULTI_GPU")
    assert config.deepspeed_config.get("zero_stage") == {"zero2": 2, "zero3": 3}.get(path.stem)
    assert ("fsdp_version", 2) in config.fsdp_config.items() or path.stem != "fsdp2"
