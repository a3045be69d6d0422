import jaxtyping
import naive
import pytest
import torch

from redistill import losses

DISTANCES = ["norm", "squared", "cosine"]
LAYOUTS = {
    "mixed": [-1, 0, 0, 0, -1, 1, 1, 2, 2, 2, 2, -1, 3, -1, 0, 0],
    "one span": [0, 0],
    "all inside": [0, 0, 0, 1, 1, 2, 2],
    "singles between": [5, 4, 4, 3, 7, 7, 2],
}


def pair(n: int, v: int = 23) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n * 1000 + v)
    student, teacher = (2 * torch.randn(n, v, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_value_and_gradient_equal_the_naive_twin(layout, distance):
    ids = LAYOUTS[layout]
    student, teacher = pair(len(ids))
    value = losses.span_correlation(student, teacher, torch.tensor(ids), distance=distance)
    twin = naive.span_correlation(student, teacher, ids, distance)
    torch.testing.assert_close(value.double(), twin, rtol=1e-4, atol=1e-6)
    weights = torch.linspace(1, 2, len(value))
    (ours,) = torch.autograd.grad((value * weights).sum(), student)
    (theirs,) = torch.autograd.grad((twin * weights).sum(), student)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    low = losses.span_correlation(
        student.bfloat16(), teacher.bfloat16(), torch.tensor(ids), distance=distance
    )
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), twin, rtol=0.1, atol=0.02)


def test_by_hand():
    """One pair of a two-class vocabulary: c_p = (.9 * .5, .1 * .5), c_q = (.5 * .5, .5 * .5)."""
    teacher = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
    value = losses.span_correlation(torch.zeros(2, 2), teacher, torch.tensor([0, 0]))
    torch.testing.assert_close(value, torch.tensor([(0.2**2 + 0.2**2) ** 0.5]))


@pytest.mark.parametrize("distance", DISTANCES)
def test_exactly_zero_with_zero_gradient_where_equal(distance):
    ids = torch.tensor(LAYOUTS["mixed"])
    for scale in (1.0, 20.0):
        student = (scale * pair(len(ids))[0].detach()).requires_grad_()
        value = losses.span_correlation(student, student.detach(), ids, distance=distance)
        assert value.shape == (4,) and (value == 0).all()
        value.sum().backward()
        assert student.grad is not None and (student.grad == 0).all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_extreme_logits_give_finite_values_and_gradients(distance):
    ids = torch.zeros(6, dtype=torch.long)
    one_hot = torch.full((6, 5), -torch.inf).scatter_(1, torch.tensor([[0], [1], [2], [2], [4], [4]]), 0.0)
    steep = 1e4 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    for teacher in (one_hot, steep, torch.zeros(6, 5)):
        for logits in (one_hot, steep, torch.zeros(6, 5)):
            student = logits.clone().requires_grad_()
            value = losses.span_correlation(student, teacher, ids, distance=distance)
            (gradient,) = torch.autograd.grad(value.sum(), student)
            assert value.isfinite().all() and (value >= 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("ids", [[], [-1, -1, -1], [0], [0, -1, 0, 1, 2]])
def test_no_pair_gives_nothing_and_keeps_the_graph(ids):
    student, teacher = pair(len(ids))
    value = losses.span_correlation(student, teacher, torch.tensor(ids, dtype=torch.long))
    assert value.shape == (0,)
    (value.sum() + 0.0).backward()
    assert student.grad is not None and (student.grad == 0).all()


def test_only_rows_of_pairs_count_and_the_teacher_gets_no_gradient():
    ids = torch.tensor(LAYOUTS["mixed"])
    student, teacher = pair(len(ids))
    losses.span_correlation(student, teacher.requires_grad_(), ids).sum().backward()
    assert student.grad is not None and teacher.grad is None
    outside = torch.tensor([0, 4, 11, 12, 13])
    touched = student.grad.abs().sum(-1) > 0
    assert not touched[outside].any() and touched.sum() == len(ids) - len(outside)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"span_ids": torch.zeros(3, dtype=torch.long)}, "span_ids must have one number per row"),
        ({"distance": "euclid"}, "distance must be one of norm, squared, cosine"),
        ({"teacher_logits": torch.zeros(4, 22)}, "one shape"),
    ],
)
def test_wrong_input_is_refused_with_a_reason(change, says, monkeypatch):
    # As a user runs it: without the shape checks that conftest.py switches on.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    student, teacher = pair(4)
    inputs = {
        "student_logits": student,
        "teacher_logits": teacher,
        "span_ids": torch.zeros(4, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=says):
        losses.span_correlation(**(inputs | change))
