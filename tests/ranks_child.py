"""What `torchrun` runs for test_ranks.py: several trainings after one another, as asked on the command line.

python ranks_child.py '[{"folder": .., "recipe": {..}, ..}, ..]'; recipe: what `test_trainer.recipe` is called with.
resume: a checkpoint. tied: whether the student's embeddings are. term_at, spoil_at: the step in which rank 1 gets a
SIGTERM, or has a loss that is not finite. holes: every second sample has no response.
"""

import json
import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from test_trainer import TOKENIZER, recipe, spoilt, trainer
from tiny import tiny_llama, tiny_qwen2

from redistill import ranks
from redistill.checkpoint import SaveOnSignal
from redistill.wrapped import is_sharded, whole_weights


def fsdp2_on_cpus():
    """accelerate shards over GPUs only, although FSDP2 runs on CPUs as well: let it take these for some."""
    stack = ExitStack()
    stack.enter_context(patch.dict(os.environ, ACCELERATE_TORCH_DEVICE="cpu"))
    found = ("gloo", DistributedType.MULTI_GPU)
    stack.enter_context(patch.object(PartialState, "_prepare_backend", lambda *_: found))
    return stack


def in_step(run, step, happen):
    """Let something happen on rank 1 whenever the objective looks at the step's logits."""
    forward = run.objective.forward

    def seen(*args):
        part = forward(*args)
        return happen(part) if ranks.index() == 1 and run.state.global_step == step - 1 else part

    run.objective.forward = seen


def told_to_stop(part):
    os.kill(os.getpid(), signal.SIGTERM)
    return part


def train(asked):
    folder = Path(asked["folder"])
    config = recipe(folder, **asked["recipe"])
    student = tiny_qwen2(len(TOKENIZER), seed=1) if asked.get("tied") else tiny_llama(len(TOKENIZER), seed=1)
    run = trainer(config, student)
    run.add_callback(SaveOnSignal())
    if "term_at" in asked:
        in_step(run, asked["term_at"], told_to_stop)
    if "spoil_at" in asked:
        in_step(run, asked["spoil_at"], lambda part: spoilt(part, float("nan")))
    if "holes" in asked:
        run.train_dataset = [
            replace(sample, response=sample.response if place % 2 else ())
            for place, sample in enumerate(run.train_dataset)
        ]
    run.train(resume_from_checkpoint=asked.get("resume"))
    sharded = bool(config.training.get("fsdp"))
    assert is_sharded(run.pair.student) == is_sharded(run.teacher.model) == sharded
    own = whole_weights(run.pair.student) | run.objective.state_dict()
    for other in ranks.gather(own):
        assert all(torch.equal(value, own[name]) for name, value in other.items())
    assert all(torch.isfinite(value).all() for value in own.values())
    assert ranks.gather(run.bad_steps.skipped) == [int("spoil_at" in asked)] * 2
    run.save_student(folder / "student")


if __name__ == "__main__":
    with ranks.together(use_cpu=True):
        for asked in json.loads(sys.argv[1]):
            with fsdp2_on_cpus() if asked["recipe"].get("training", {}).get("fsdp") else ExitStack():
                train(asked)
