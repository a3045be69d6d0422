import math
from functools import partial

import jaxtyping
import naive
import pytest
import torch

from redistill import losses

SHAPES = [(4, 16), (1, 7), (3, 37)]
CASES = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jensen_shannon", {}),
    ("jensen_shannon", {"beta": 0.9}),
    ("skewed_forward_kl", {}),
    ("skewed_forward_kl", {"alpha": 0.7}),
    ("skewed_reverse_kl", {}),
    ("skewed_reverse_kl", {"alpha": 0.7}),
    ("adaptive_kl", {}),
    ("adaptive_kl", {"mu": 0.9}),
    ("total_variation", {}),
    ("todi", {}),
    ("todi", {"beta": 0.0}),
    ("todi", {"beta": 4.0}),
    ("alpha_beta", {}),
    ("alpha_beta", {"alpha": 1.0, "beta": 1.0}),
    ("alpha_beta", {"alpha": 0.5, "beta": 0.0}),
    ("alpha_beta", {"alpha": 0.0, "beta": 0.3}),
    ("alpha_beta", {"alpha": 0.0, "beta": 0.0}),
]
every_case = pytest.mark.parametrize(("name", "options"), CASES)
every_divergence = pytest.mark.parametrize("name", sorted(losses.DIVERGENCES))


def pair(shape: tuple[int, int], scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    student, teacher = (scale * torch.randn(shape, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("shape", SHAPES)
@every_case
def test_value_and_gradient_equal_the_naive_twin(name, options, shape):
    student, teacher = pair(shape)
    value = losses.DIVERGENCES[name](student, teacher, **options)
    twin = naive.rows(getattr(naive, name), student, teacher, **options)
    torch.testing.assert_close(value.double(), twin, rtol=1e-4, atol=1e-6)
    weights = torch.linspace(1, 2, len(value))
    (ours,) = torch.autograd.grad((value * weights).sum(), student)
    (theirs,) = torch.autograd.grad((twin * weights).sum(), student)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

    low = losses.DIVERGENCES[name](student.bfloat16(), teacher.bfloat16(), **options)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), twin, rtol=0.05, atol=0.02)


@every_case
def test_zero_where_equal_and_never_negative(name, options):
    divergence = partial(losses.DIVERGENCES[name], **options)
    student, teacher = pair((40, 33))
    assert (divergence(student, teacher) > 0).all()
    equal = divergence(student, student.detach())
    torch.testing.assert_close(equal, torch.zeros(40), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(equal.sum(), student)
    torch.testing.assert_close(gradient, torch.zeros(40, 33), rtol=0, atol=1e-6)


@every_divergence
def test_a_constant_added_to_a_row_changes_nothing(name):
    divergence = losses.DIVERGENCES[name]
    student, teacher = pair((5, 101))
    moved = divergence(student + 30, teacher - torch.arange(5.0)[:, None])
    torch.testing.assert_close(moved, divergence(student, teacher), rtol=1e-4, atol=1e-5)


@every_case
def test_extreme_logits_give_finite_values_and_gradients(name, options):
    divergence = partial(losses.DIVERGENCES[name], **options)
    one_hot = torch.full((4, 9), -torch.inf)
    one_hot[:, 2] = 0.0
    barred, _ = pair((4, 9))
    barred = barred.detach().clone()
    barred[:, 5:] = -torch.inf
    steep, flat = 1e4 * torch.randn(4, 9, generator=torch.Generator().manual_seed(3)), torch.zeros(4, 9)
    students, teachers = (one_hot, barred, steep, flat, barred.flip(-1)), (one_hot, barred, steep, flat)
    student = torch.cat([logits for logits in students for _ in teachers]).requires_grad_()
    value = divergence(student, torch.cat(teachers * len(students)))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all() and (value >= -1e-6).all()
    assert gradient.isfinite().all()
    # A class that both bar counts for nothing.
    student = barred + torch.arange(9.0)
    assert torch.allclose(divergence(student, barred), divergence(student[:, :5], barred[:, :5]))


@every_divergence
def test_no_rows_keep_the_graph(name):
    student = torch.randn(0, 7, requires_grad=True)
    value = losses.DIVERGENCES[name](student, torch.randn(0, 7))
    assert value.shape == (0,)
    value.sum().backward()
    assert student.grad is not None


@every_divergence
def test_the_teacher_gets_no_gradient(name):
    student, teacher = pair((4, 64))
    losses.DIVERGENCES[name](student, teacher.requires_grad_()).sum().backward()
    assert teacher.grad is None


def test_the_ends_of_the_skew_and_of_beta_are_the_plain_divergences():
    student, teacher = pair((5, 101))
    forward, reverse = losses.forward_kl(student, teacher), losses.reverse_kl(student, teacher)
    torch.testing.assert_close(losses.skewed_forward_kl(student, teacher, alpha=0.0), forward)
    torch.testing.assert_close(losses.skewed_reverse_kl(student, teacher, alpha=0.0), reverse)
    torch.testing.assert_close(losses.jensen_shannon(student, teacher, beta=0.0), forward)
    torch.testing.assert_close(losses.jensen_shannon(student, teacher, beta=1.0), reverse)


def test_the_ends_of_alpha_beta_are_the_plain_divergences_and_are_reached_smoothly():
    student, teacher = pair((5, 101))
    ends = {
        (1.0, 0.0): losses.forward_kl(student, teacher),
        (0.0, 1.0): losses.reverse_kl(student, teacher),
        (0.0, 0.0): 0.5 * (teacher.log_softmax(-1) - student.log_softmax(-1)).square().sum(-1),
    }
    for (alpha, beta), expected in ends.items():
        near = losses.alpha_beta(student, teacher, alpha=alpha or 1e-5, beta=beta or 1e-5)
        torch.testing.assert_close(losses.alpha_beta(student, teacher, alpha, beta), expected)
        torch.testing.assert_close(near, expected, rtol=1e-3, atol=0)


def test_alpha_beta_still_pulls_up_a_class_that_fp32_probabilities_cannot_hold():
    student = torch.tensor([[0.0, 0.0, -120.0]], requires_grad=True)
    losses.alpha_beta(student, torch.zeros(1, 3)).sum().backward()
    # d/dz of class k: q^beta (q^alpha - p^alpha) / alpha, less q_k times the row's sum of it.
    pull = -math.exp(0.7 * (-120.0 - math.log(2))) * 3**-0.2 / 0.2
    assert student.grad is not None and student.grad[0, 2].item() == pytest.approx(pull, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"alpha": 1.0, "beta": 0.01}, {"alpha": 0.01, "beta": 1.0}])
def test_alpha_beta_keeps_its_digits_where_student_and_teacher_nearly_agree(options):
    away, teacher = pair((5, 1001))
    student = teacher + 0.01 * away.detach()
    twin = naive.rows(naive.alpha_beta, student, teacher, **options)
    value = losses.alpha_beta(student, teacher, **options)
    torch.testing.assert_close(value.double(), twin, rtol=1e-4, atol=0)


def test_todi_has_the_value_of_both_kl_together_and_another_gradient():
    student, teacher = pair((5, 101))
    both = losses.forward_kl(student, teacher) + losses.reverse_kl(student, teacher)
    value = losses.todi(student, teacher)
    torch.testing.assert_close(value, both)
    torch.testing.assert_close(losses.todi(student, teacher, beta=0.0), both / 2)
    (ours,) = torch.autograd.grad(value.sum(), student)
    (theirs,) = torch.autograd.grad(both.sum(), student)
    # With respect to log q the detached weight leaves out pq / (p + q) log(p / q).
    q, p = student.detach().softmax(-1), teacher.softmax(-1)
    left_out = p * q / (p + q) * (p / q).log()
    torch.testing.assert_close(ours - theirs, left_out - q * left_out.sum(-1, keepdim=True))
    assert (ours - theirs).norm() > 0.02 * theirs.norm()


def test_cross_entropy():
    student, _ = pair((5, 101))
    targets = torch.tensor([0, 100, 3, 3, 50])
    expected = [-student[i].double().softmax(-1)[t].log() for i, t in enumerate(targets.tolist())]
    value = losses.cross_entropy(student.bfloat16().float(), targets)
    torch.testing.assert_close(losses.cross_entropy(student, targets).double(), torch.stack(expected))
    torch.testing.assert_close(losses.cross_entropy(student.bfloat16(), targets), value)
    empty = losses.cross_entropy(student[:0], targets[:0])
    assert empty.shape == (0,) and empty.requires_grad


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda s, t: losses.forward_kl(s[None], t[None]), "student_logits must be"),
        (lambda s, t: losses.reverse_kl(s, t.long()), "teacher_logits must be"),
        (lambda s, t: losses.total_variation(s, t[:, :-1]), "one shape"),
        (lambda s, t: losses.jensen_shannon(s, t, beta=1.5), "beta must be"),
        (lambda s, t: losses.skewed_forward_kl(s, t, alpha=1.0), "alpha must be"),
        (lambda s, t: losses.skewed_reverse_kl(s, t, alpha=-0.1), "alpha must be"),
        (lambda s, t: losses.adaptive_kl(s, t, mu=1.0), "mu must lie"),
        (lambda s, t: losses.todi(s, t, beta=-1.0), "beta must be"),
        (lambda s, t: losses.alpha_beta(s, t, alpha=-0.5, beta=0.5), "alpha must be"),
        (lambda s, t: losses.alpha_beta(s, t, beta=float("inf")), "beta must be"),
        (lambda s, _: losses.cross_entropy(s, torch.zeros(3, dtype=torch.long)), "cross_entropy needs"),
        (lambda s, _: losses.cross_entropy(s, torch.full((4,), -100)), "targets must lie in 0..63"),
    ],
)
def test_wrong_input_is_refused_with_a_reason(call, says, monkeypatch):
    # As a user runs it: without the shape checks that conftest.py switches on.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=says):
        call(*pair((4, 64)))
