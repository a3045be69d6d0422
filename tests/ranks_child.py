"""What `torchrun` runs for test_ranks.py: several trainings after one another, as asked on the command line.

python ranks_child.py '[{"folder": .., "recipe": {..}, ..}, ..]'; recipe: what `test_trainer.recipe` is called with.
resume: a checkpoint. streamed: whether the data are. tied: whether the student's embeddings are. term_at, spoil_at:
the step in which rank 1 gets a SIGTERM, or has a loss that is not finite. holes: every second sample has no response.
measured: see there.
"""

import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from rich.console import Console
from test_stream import streamed
from test_trainer import TOKENIZER, recipe, samples, spoilt, trainer
from tiny import tiny_llama, tiny_qwen2
from torch.distributed.tensor import DTensor

from redistill import ranks
from redistill.checkpoint import SaveOnSignal
from redistill.config import Config
from redistill.prepare import Prepared, Split
from redistill.run import _train
from redistill.sampling import sample
from redistill.wrapped import is_sharded, whole_weights


def sharded_on_cpus():
    """accelerate shards over GPUs only, although FSDP2 and DeepSpeed run on CPUs too: let it take these for some."""
    stack = ExitStack()
    # LOCAL_SIZE: DeepSpeed would ask the machine for its number of CPUs, again and again.
    stack.enter_context(patch.dict(os.environ, ACCELERATE_TORCH_DEVICE="cpu", LOCAL_SIZE="1"))
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


def in_parts(model):
    """Whether this rank holds no layer's weights whole."""
    layers = model.base_model.layers.parameters()
    return all(isinstance(each, DTensor) or each.numel() == 0 for each in layers)


def train_looked_at(run, resume):
    """Train; what was found whenever a token was drawn."""
    seen = set()

    def looked(*args):
        seen.add(in_parts(run.pair.student))
        return sample(*args)

    with patch("redistill.generate.sample", looked):
        run.train(resume_from_checkpoint=resume)
    return seen


def measured(folder, recipe_of):
    """A run that is measured before and after training, as the command does it."""
    sections = recipe(folder, **recipe_of).model_dump(exclude_unset=True)
    some = {"seeds": [1], "batch_size": 2, "max_new_tokens": 6}
    config = Config.model_validate(sections | {"evaluation": some})
    asked = Split(tuple(samples(3, seed=9)), (("a",), ("b",), ("c",)), ("d", "e", "f"))
    models = tiny_llama(len(TOKENIZER), seed=1), tiny_llama(len(TOKENIZER), hidden=48, seed=2)
    prepared = Prepared(
        *models, TOKENIZER, Split(tuple(samples(24))), Split(tuple(samples(6, seed=9))), asked
    )
    return _train(config, folder, Console(quiet=True), prepared, False, time.perf_counter())


def train(asked):
    folder = Path(asked["folder"])
    if asked.get("measured"):
        folder.mkdir(exist_ok=True)
        assert measured(folder, asked["recipe"]).finished
        return
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
    if asked.get("streamed"):
        run.train_dataset = streamed(run.train_dataset)
    seen = train_looked_at(run, asked.get("resume"))
    zero = config.training.get("deepspeed", {}).get("zero_optimization", {})
    sharded = bool(config.training.get("fsdp")) or zero.get("stage") == 3
    assert is_sharded(run.pair.student) == is_sharded(run.teacher.model) == sharded
    assert seen == {True} if sharded and not config.rollout.gather else seen <= {False}
    own = whole_weights(run.pair.student) | run.objective.state_dict()
    for other in ranks.gather(own):
        assert all(torch.equal(value, own[name]) for name, value in other.items())
    assert all(torch.isfinite(value).all() for value in own.values())
    assert ranks.gather(run.bad_steps.skipped) == [int("spoil_at" in asked)] * 2
    run.save_student(folder / "student")


if __name__ == "__main__":
    with ranks.together(use_cpu=True):
        for asked in json.loads(sys.argv[1]):
            training = asked["recipe"].get("training", {})
            with sharded_on_cpus() if {"fsdp", "deepspeed"} & {*training} else ExitStack():
                train(asked)
