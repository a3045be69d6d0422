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
]
every_divergence = pytest.mark.parametrize("name", sorted(losses.DIVERGENCES))


def pair(shape: tuple[int, int], scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    student, teacher = (scale * torch.randn(shape, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "options"), CASES)
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


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_jensen_shannon_equals_trl(beta):
    from trl.experimental import gkd

    student, teacher = pair((5, 101))
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, reduction="none")
    ours = losses.jensen_shannon(student, teacher, beta=beta)
    torch.testing.assert_close(ours, theirs[0].sum(-1), rtol=1e-5, atol=1e-6)


@every_divergence
def test_zero_where_equal_and_never_negative(name):
    divergence = losses.DIVERGENCES[name]
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


@every_divergence
def test_extreme_logits_give_finite_values_and_gradients(name):
    one_hot = torch.full((4, 9), -torch.inf)
    one_hot[:, 2] = 0.0
    barred, _ = pair((4, 9))
    barred = barred.detach().clone()
    barred[:, 5:] = -torch.inf
    steep, flat = 1e4 * torch.randn(4, 9, generator=torch.Generator().manual_seed(3)), torch.zeros(4, 9)
    for teacher in (one_hot, barred, steep, flat):
        for logits in (one_hot, barred, steep, flat, barred.flip(-1)):
            student = logits.clone().requires_grad_()
            value = losses.DIVERGENCES[name](student, teacher)
            (gradient,) = torch.autograd.grad(value.sum(), student)
            assert value.isfinite().all() and (value >= -1e-6).all()
            assert gradient.isfinite().all()
    # A class that both bar counts for nothing.
    student = barred + torch.arange(9.0)
    assert torch.allclose(
        losses.DIVERGENCES[name](student, barred), losses.DIVERGENCES[name](student[:, :5], barred[:, :5])
    )


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
        (lambda s, _: losses.cross_entropy(s, torch.zeros(3, dtype=torch.long)), "cross_entropy needs"),
        (lambda s, _: losses.cross_entropy(s, torch.full((4,), -100)), "targets must lie in 0..63"),
    ],
)
def test_wrong_input_is_refused_with_a_reason(call, says, monkeypatch):
    # As a user runs it: without the shape checks that conftest.py switches on.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=says):
        call(*pair((4, 64)))
