"""A process that really has no more memory: the allocator of the C library says no, and the step is halved."""

from __future__ import annotations

import json

import pytest
from runs import SHARE, lines

LIMIT = """
import resource
from transformers import TrainerCallback
import redistill.run

class Bound(TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LIMIT_BYTES, resource.RLIM_INFINITY))

make = redistill.run.trainer_of
redistill.run.trainer_of = lambda config, prepared, callbacks: make(config, prepared, [*callbacks, Bound()])
"""
ROOM_MB = 100
RECORDS = [{"prompt": f"Count to {n}.", "completion": " ".join(map(str, range(n)))} for n in range(90, 114)]


@pytest.mark.skipif(not SHARE, reason="takes a quarter of a minute: a part of `make faults`")
def test_the_step_is_halved_and_the_loss_is_the_same(place, lives, tell):
    (place / "long.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    settings = {"data.path": "long.jsonl", "training.per_device_train_batch_size": 24, "training.max_steps": 3,
                "rollout.lmbda": 0.0, "rollout.schedule": "constant", "rollout.max_completion_length": 400,
                "training.eval_strategy": "no"}  # fmt: skip
    losses = []
    for name, megabytes in (("roomy", 0), ("narrow", ROOM_MB)):
        first = LIMIT.replace("LIMIT_BYTES", str(megabytes * 2**20)) if megabytes else ""
        life = lives.train(name, place, settings, first=first)
        assert life.wait() == 0, life.said()
        assert ("out of memory in the loss with 24 rows at once: 12 from now on" in life.said()) == bool(
            megabytes
        )
        losses.append([record["loss"] for record in lines(place / name / "steps.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    tell(
        f"memory: a limit of {ROOM_MB} MB above what was used: the step was halved, its losses were the same"
    )
