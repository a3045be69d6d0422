"""Teacher-mixed sampling: tokens are drawn from (1 - a) q + a p, in every place and whatever the batch."""

import pytest
import torch
from table_models import table, table_model
from tiny import tiny_llama

from redistill.generate import generate
from redistill.sampling import Sampling, mixed_logits

STUDENT = table({0: {1: 0.9, 2: 0.1}, 1: {2: 0.5, 3: 0.5}, 2: {0: 1.0}, 3: {3: 1.0}}, 4).clamp(min=1e-9)
TEACHER = table({0: {2: 0.8, 3: 0.2}, 1: {0: 1.0}, 2: {0: 0.5, 1: 0.5}, 3: {0: 1.0}}, 4).clamp(min=1e-9)


def write(rows, share, batch_size=64, steps=2, **options):
    return generate(
        table_model(STUDENT),
        [[0]] * rows,
        limits=[steps] * rows,
        sampling=Sampling(**options),
        eos=frozenset(),
        generator=torch.Generator().manual_seed(5),
        batch_size=batch_size,
        partner=(table_model(TEACHER), share),
    )


def test_two_tokens_come_as_often_as_the_mixture_says():
    rows, share = 4000, 0.3
    mixture = (1 - share) * STUDENT + share * TEACHER
    answers = write(rows, share)
    counts = torch.zeros(4, 4, dtype=torch.float64)
    for first, second in answers:
        counts[first, second] += 1
    expected = rows * mixture[0][:, None] * mixture
    unlikely = expected < 1e-3
    assert not counts[unlikely].any()
    statistic = ((counts - expected).square() / expected)[~unlikely].sum()
    freedom = int((~unlikely).sum()) - 1
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5
    assert write(50, share, batch_size=7) == write(50, share)


def test_greedy_takes_the_most_probable_of_the_mixture():
    assert write(1, 0.3, temperature=0.0, steps=1) == [(1,)]  # 0.63 against 0.31
    assert write(1, 0.7, temperature=0.0, steps=1) == [(2,)]  # 0.27 against 0.59


def test_mixed_logits_are_the_log_of_the_mixture():
    generator = torch.Generator().manual_seed(0)
    own, other = (3 * torch.randn(5, 11, generator=generator) for _ in range(2))
    mixed = mixed_logits(own, other, 0.2)
    torch.testing.assert_close(mixed.exp(), 0.8 * own.softmax(-1) + 0.2 * other.softmax(-1))


@pytest.mark.parametrize("share", [1e-6, 1 - 1e-6])
def test_the_ends_are_the_models_themselves(share):
    one, other = tiny_llama(seed=1), tiny_llama(seed=2)
    options = {
        "limits": [10] * 3,
        "sampling": Sampling(0.0),
        "eos": frozenset(),
        "generator": None,
        "batch_size": 2,
    }
    prompts = [[5, 9, 11], [7], [8, 8]]
    alone = generate(one if share < 0.5 else other, prompts, **options)
    assert generate(one, prompts, **options, partner=(other, share)) == alone
