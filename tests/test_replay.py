"""The buffer forgets the oldest, comes back from its state, and the schedule moves only on a rise."""

import json

import torch

from redistill.replay import ReplayBuffer, ShareSchedule
from redistill.sample import Edit, Sample


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
