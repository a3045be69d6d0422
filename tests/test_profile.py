"""`redistill profile` as a user runs it: a table of a step's phases, arithmetic that adds up, nothing left behind."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
import yaml
from test_docs import keys_under
from tiny import save_tiny, tiny_llama, tiny_tokenizer

from redistill.chat import to_sample
from redistill.clock import Clock
from redistill.meters import Flops, PeakMemory
from redistill.sample import Example

RECORD = {"instruction": "Name a colour of the river.", "output": "The river is often brown in the morning."}
PHASES = ["waiting", "rollout", "scoring", "revision", "spans", "loss", "optimizer", "rest"]
BATCH, WIDTH = 4, 32


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    save_tiny(folder)
    (folder / "tmp").mkdir()
    (folder / "train.jsonl").write_text((json.dumps(RECORD) + "\n") * 20)
    recipe = {
        "student": {"model_name_or_path": "student"},
        "teacher": {"model_name_or_path": "teacher"},
        "data": {"path": "train.jsonl", "eval_path": "train.jsonl"},
        "rollout": {"lmbda": 1.0, "max_completion_length": 8},
        "budget": {"student_tokens": 10},
        "training": {"per_device_train_batch_size": BATCH, "save_steps": 1, "eval_strategy": "steps",
                     "eval_steps": 1, "use_cpu": True},
        "evaluation": {"seeds": [1]},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def profile(place, *args):
    """What was said, and the JSON; the disk is as it was."""
    before = sorted(place.rglob("*"))
    places = {"TMPDIR": str(place / "tmp"), "REDISTILL_CACHE": str(place / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "redistill", "profile", "recipe.yaml", "--json", "found.json", *args],
        cwd=place, env=os.environ | places, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((place / "found.json").read_text())
    (place / "found.json").unlink()
    assert sorted(place.rglob("*")) == before
    return done.stdout, found


def test_a_row_for_each_phase_and_shares_of_the_whole(place):
    said, found = profile(place, "--steps", "2", "--set", "data.responses=teacher")
    assert [each["name"] for each in found["phases"]] == PHASES and found["steps"] == 2
    rows = [
        line.split()[0] for line in said.splitlines() if line.split()[:1] in [[p] for p in [*PHASES, "sum"]]
    ]
    assert rows == [*PHASES, "sum"] and "Most time beyond that floor" in said
    whole = found["sum"]
    assert keys_under("## The JSON of `redistill profile`") == {*found, *whole}
    for key in ("share", "seconds", "flops", "floor_seconds"):
        assert sum(each[key] for each in found["phases"]) == pytest.approx(whole[key])
    assert whole["share"] == pytest.approx(1)
    for each in found["phases"]:
        assert (each["flops"] > 0) == (each["name"] in {"rollout", "scoring", "revision", "loss"})
        if each["flops"]:
            assert each["flops_per_second"] == pytest.approx(each["flops"] / each["seconds"])
            assert each["floor_seconds"] == pytest.approx(each["seconds"] * each["matmul_share"])
        if sys.platform == "linux" and each["peak_bytes"] is not None:
            assert 1e8 < each["peak_bytes"] <= whole["peak_bytes"]


def test_the_arithmetic_of_the_loss_is_what_the_shapes_say(place):
    _, found = profile(place, "--method", "kd", "--steps", "1")
    assert found["dtype"] == "float32" and "scoring" not in {each["name"] for each in found["phases"]}

    tokenizer = tiny_tokenizer()
    sample = to_sample(
        Example(RECORD["instruction"], references=(RECORD["output"],), source=""), tokenizer, template="chat",
        system=None, max_prompt_length=256, max_completion_length=8, on_long_prompt="drop",
    )  # fmt: skip
    length, answers = len(sample.prompt + sample.response) - 1, BATCH * len(sample.response)
    head = 2 * len(tokenizer) * WIDTH * answers

    def forward(layers):
        model = tiny_llama(len(tokenizer), layers=layers, hidden=WIDTH)
        weights = sum(each.numel() for each in model.model.layers.parameters() if each.dim() == 2)
        return 2 * weights * BATCH * length, 4 * layers * BATCH * length**2 * WIDTH

    (student, looking), (teacher, teacher_looking) = forward(1), forward(3)
    # The backward of a product is two of its size, that of attention two and a half.
    wanted = 3 * (student + head) + 3.5 * looking + teacher + head + teacher_looking
    loss = next(each for each in found["phases"] if each["name"] == "loss")
    assert loss["flops"] == pytest.approx(wanted, rel=0.002)


PRODUCTS = {
    "into a buffer": lambda a: torch.mm(a[0], a[0], out=torch.empty(8, 8)),
    "with a bias, into a buffer": lambda a: torch.addmm(a[0, 0], a[0], a[0], out=torch.empty(8, 8)),
    "added in place": lambda a: torch.zeros(8, 8).addmm_(a[0], a[0]),
    "of several, added in place": lambda a: torch.zeros(2, 8, 8).baddbmm_(a, a),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_that_write_into_what_is_there_count(name):
    meter = Flops()
    with Clock(meter).phase("product"):
        PRODUCTS[name](torch.ones(2, 8, 8))
    assert meter.found == {"product": 2 * 8**3 * (2 if "several" in name else 1)}


def test_a_phase_inside_another_is_taken_out_of_it():
    meter, square = Flops(), torch.ones(8, 8)
    clock = Clock(meter)
    started = time.perf_counter()
    with clock.phase("outer"):
        square @ square
        with clock.phase("inner"):
            time.sleep(0.05)
            square @ square
            square @ square
    assert meter.found == {"inner": 2 * 2 * 8**3, "outer": 2 * 8**3}
    assert clock.seconds["inner"] >= 0.05 and clock.seconds["outer"] >= 0
    assert sum(clock.seconds.values()) <= time.perf_counter() - started


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its peak")
def test_the_peak_of_a_phase_is_its_own():
    memory = PeakMemory(torch.device("cpu"))
    clock = Clock(memory)
    if not memory.found and not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system forbids it")
    with clock.phase("large"):
        torch.ones(2**26)  # 256 MiB, which the allocator gives back at once
    with clock.phase("small"):
        torch.ones(2**10)
        with clock.phase("large inside"):
            torch.ones(2**26)
    assert clock.seconds.keys() < memory.found.keys() == {"rest", "large", "small", "large inside"}
    for large in ("large", "large inside"):
        assert memory.found[large] - max(memory.found["small"], memory.found["rest"]) > 200 * 2**20
