"""The buffer forgets the oldest, stays small, comes back from its state; the schedule moves only on a rise."""

import gc
import json
import tracemalloc

import pytest
import torch

from redistill.config import Config
from redistill.replay import ReplayBuffer, ShareSchedule, most_bytes
from redistill.rollout import initial_state
from redistill.sample import Edit, Sample
from redistill.settings import RolloutSettings


def sample(number):
    edit = Edit(0, 1, 2, 0.5, -1.5, (number, 3))
    return Sample((number,), (2, 3), "rollout", f"f:{number}", (edit,))


def test_fifo_and_drawing_without_repetition():
    buffer = ReplayBuffer(3)
    buffer.push([sample(i) for i in range(5)])
    drawn = buffer.draw(10, torch.Generator().manual_seed(0))
    assert sorted(s.prompt[0] for s in drawn) == [2, 3, 4]
    assert buffer.draw(2, torch.Generator().manual_seed(1)) == buffer.draw(
        2, torch.Generator().manual_seed(1)
    )


def test_state_survives_json():
    buffer, other = ReplayBuffer(4), ReplayBuffer(4)
    buffer.push([sample(i) for i in range(3)])
    other.load(json.loads(json.dumps(buffer.state())))
    generator = torch.Generator().manual_seed(0)
    assert other.draw(3, generator) == buffer.draw(3, generator.manual_seed(0))


def test_answers_are_kept_only_where_they_are_replayed():
    """Else a checkpoint would carry a thousand answers that nobody asks for again."""
    for ratio, kept in ((0.0, 0), (0.5, 2)):
        state = initial_state(RolloutSettings(replay_capacity=2, replay_ratio=ratio), seed=0)
        state.buffer.push([sample(i) for i in range(5)])
        assert len(state.buffer) == kept


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_full_buffer_stays_under_what_it_may_hold(weight):
    """Samples as long as can be, ids that Python makes anew each time, and all that a correction can carry."""
    path, prompt, answer, rounds = "data/" + "x" * 80 + ".jsonl", 100, 150, 0 if weight else 3
    config = Config.model_validate({
        "student": {"model_name_or_path": "a"}, "teacher": {"model_name_or_path": "b"},
        "data": {"path": path, "max_prompt_length": prompt}, "revision": {"rounds": rounds},
        "rollout": {"max_completion_length": answer, "replay_capacity": 200, "replay_ratio": 0.5},
        "objective": {"policy": {"weight": weight}},
    })  # fmt: skip
    numbers = iter(range(10**5, 10**9))

    def ids(count):
        return tuple(next(numbers) for _ in range(count))

    def longest(number):
        gains = tuple(n / 7 for n in ids(answer)) if weight else ()
        edits = tuple(
            Edit(n * 300, *ids(2), n / 3, -n / 7, ids(answer), tuple(n / 3 for n in ids(answer)))
            for n in range(rounds)
        )
        source = f"{path}:{10**9 + number}"
        return Sample(ids(prompt), ids(answer), "rollout", source, edits, False, gains, gains, ids(prompt))

    buffer = ReplayBuffer(200)
    gc.collect()
    tracemalloc.start()
    for number in range(300):
        buffer.push([longest(number)])
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(buffer) == 200
    assert 0.4 * most_bytes(config) < held < most_bytes(config)
    other = ReplayBuffer(200)
    other.load(json.loads(json.dumps(buffer.state())))
    drawn = other.draw(200, torch.Generator().manual_seed(0))
    assert drawn == buffer.draw(200, torch.Generator().manual_seed(0))
    assert all(len(each.edits) == rounds and not any(edit.before for edit in each.edits) for each in drawn)


def test_share_grows_only_when_the_validation_loss_rises_by_more_than_epsilon():
    schedule = ShareSchedule(0.1, maximum=0.3, step=0.1, epsilon=0.05)
    shares = []
    for loss in (2.0, 1.0, 1.04, 1.06, 1.08, 1.2, 1.3):
        schedule.update(loss)
        shares.append(round(schedule.share, 3))
    assert shares == [0.1, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    constant = ShareSchedule(0.5, 0.5)
    for loss in (1.0, 3.0):
        constant.update(loss)
    assert constant.share == 0.5
