"""MiniLLM's gradient: single step and policy gradient together are the gradient of reverse KL over sequences."""

import itertools

import pytest
import torch

from redistill.config import PolicySettings
from redistill.losses import policy_gradient, reverse_kl
from redistill.policy import rewards_to_go, with_advantages
from redistill.sample import Sample
from redistill.scoring import Score

V, T = 3, 3


class Table:
    """log-probabilities [T, V] after every prefix of at most T - 1 tokens, as free parameters."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.logits = {
            prefix: torch.randn(V, generator=generator, dtype=torch.float64, requires_grad=True)
            for length in range(T)
            for prefix in itertools.product(range(V), repeat=length)
        }

    def rows(self, sequence):
        return torch.stack([self.logits[sequence[:t]] for t in range(T)])

    def log_likelihood(self, sequence):
        return self.rows(sequence).log_softmax(-1).gather(1, torch.tensor(sequence)[:, None])[:, 0]


def sequences():
    return list(itertools.product(range(V), repeat=T))


@pytest.mark.parametrize("mix", [0.0, 0.2, 0.7])
def test_the_two_parts_are_the_gradient_of_reverse_kl_over_sequences(mix):
    student, teacher = Table(0), Table(1)
    leaves = list(student.logits.values())
    exact = sum(
        (q := student.log_likelihood(s).sum()).exp() * (q - teacher.log_likelihood(s).sum().detach())
        for s in sequences()
    )
    wanted = torch.autograd.grad(exact, leaves)

    plain = PolicySettings(weight=1.0, length_normalization=False, whiten=False, clip=0.2)
    loss = torch.zeros((), dtype=torch.float64)
    for sequence in sequences():
        q, p = student.log_likelihood(sequence), teacher.log_likelihood(sequence).detach()
        score = Score(torch.zeros(T), torch.zeros(T).long(), p, q.detach(), p - q.detach())
        (sample,) = with_advantages([Sample((0,), sequence)], [score], plain, mix)
        behaviour = torch.tensor(sample.behaviour, dtype=torch.float64)
        advantages = torch.tensor(sample.advantages, dtype=torch.float64)
        # MiniLLM weighs a token by its own ratio alone; with those of all others beside it, it is exact.
        ratio = q.detach() - behaviour
        prefix, others = ratio.cumsum(0) - ratio, ratio.sum() - ratio
        step = prefix.exp() * reverse_kl(student.rows(sequence), teacher.rows(sequence).detach())
        policy = others.exp() * policy_gradient(q, behaviour, advantages, clip=1e9)
        loss = loss + behaviour.sum().exp() * (step + policy).sum()
    got = torch.autograd.grad(loss, leaves)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_the_clip_takes_the_gradient_away_only_where_it_would_go_further():
    log_q = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.0], requires_grad=True)
    gain = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    value = policy_gradient(log_q, torch.zeros(5), gain, clip=0.2)
    weight = log_q.detach().exp()
    expected = torch.tensor([-1.2, float(weight[1]), -float(weight[2]), 0.8, -2.0])
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value.sum(), log_q)
    assert gradient[0] == 0 and gradient[3] == 0
    torch.testing.assert_close(gradient[[1, 2, 4]], (-gain * weight)[[1, 2, 4]])


def test_no_advantage_no_loss_whatever_the_weight():
    log_q = torch.tensor([0.0, 80.0], requires_grad=True)
    value = policy_gradient(log_q, torch.tensor([0.0, -1e5]), torch.zeros(2))
    value.sum().backward()
    assert value.tolist() == [0.0, 0.0] and log_q.grad.tolist() == [0.0, 0.0]


def test_rewards_to_go_by_hand_and_whitened():
    q, p = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-0.5, -1.0, -4.0])
    score = Score(torch.zeros(3), torch.zeros(3).long(), p, q, p - q)  # rewards 0.5, 1, -1
    summed, averaged = PolicySettings(length_normalization=False), PolicySettings()
    assert rewards_to_go(score, summed).tolist() == [0.0, -1.0, 0.0]
    assert rewards_to_go(score, averaged).tolist() == [0.0, -1.0, 0.0]
    p = torch.tensor([0.0, 1, 2, 3])
    longer = Score(torch.zeros(4), torch.zeros(4).long(), p, torch.zeros(4), p)
    assert rewards_to_go(longer, averaged).tolist() == [2.0, 2.5, 3.0, 0.0]
    # As MiniLLM's code: from the token on, over as many.
    own = PolicySettings(own_token=True)
    assert rewards_to_go(longer, own.model_copy(update={"length_normalization": False})).tolist() == [
        6,
        6,
        5,
        3,
    ]
    assert rewards_to_go(longer, own).tolist() == [1.5, 2.0, 2.5, 3.0]
    for settings, left_out in ((averaged, 1), (own, 0)):
        made = with_advantages([Sample((0,), (1, 2, 0))] * 2, [score, longer], settings, 0.5)
        every = torch.tensor(
            [gain for each in made for gain in each.advantages[: len(each.advantages) - left_out]]
        )
        assert abs(float(every.mean())) < 1e-6 and float(every.std()) == pytest.approx(1.0, abs=1e-5)
        # Shifted like the others an end would be better than its answer, however good that is.
        assert [each.advantages[-1] == 0.0 for each in made] == [bool(left_out)] * 2
    single = Score(*(each[:1] for each in score.fields()))
    assert with_advantages([Sample((0,), (1,))], [single], averaged, 0.0)[0].advantages == (0.0,)
    assert made[0].behaviour[0] == pytest.approx(float(torch.tensor([-1.0, -0.5]).exp().mean().log()))


@pytest.mark.parametrize("wrong", [{"clip": 0.0}, {"advantages": torch.zeros(3)}])
def test_wrong_input_is_refused(wrong, monkeypatch):
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    given = {"log_likelihood": torch.zeros(2), "behaviour": torch.zeros(2), "advantages": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"one number per token|clip must be positive"):
        policy_gradient(**{**given, **wrong})
