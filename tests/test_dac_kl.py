import itertools

import jaxtyping
import naive
import pytest
import torch

from redistill import losses
from redistill.losses import f_divergences as f
from redistill.losses.quantile import first_largest

SHAPES = [(4, 16), (1, 7), (3, 37)]
RESTS = ["bucket", "drop", "renormalize"]
QUANTILES = ["mass", "rank"]
STEP = 1e-5
# Class by class, and the same divergence as a whole.
DIVERGENCES = {
    "forward_kl": (f.forward_kl_parts, losses.forward_kl),
    "reverse_kl": (f.reverse_kl_parts, losses.reverse_kl),
    "jensen_shannon": (f.jensen_shannon_parts(0.3), lambda q, p: losses.jensen_shannon(q, p, 0.3)),
    "skewed_forward_kl": (f.skewed_forward_kl_parts(0.1), losses.skewed_forward_kl),
    "skewed_reverse_kl": (f.skewed_reverse_kl_parts(0.1), losses.skewed_reverse_kl),
    "total_variation": (f.total_variation_parts, losses.total_variation),
}


def case(shape: tuple[int, int], scale: float = 2.0) -> tuple[torch.Tensor, ...]:
    """Student and teacher logits, lower and upper levels."""
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    student, teacher = (scale * torch.randn(shape, generator=generator) for _ in range(2))
    lower = 0.02 + 0.3 * torch.rand(shape[0], generator=generator)
    upper = 0.6 + 0.38 * torch.rand(shape[0], generator=generator)
    return student.requires_grad_(), teacher, lower.requires_grad_(), upper.requires_grad_()


def open_levels(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(n), torch.ones(n)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(
    ("rest", "quantile", "keep_target"), list(itertools.product(RESTS, QUANTILES, [True, False]))
)
def test_values_and_all_gradients_equal_the_naive_twin(rest, quantile, keep_target, name, shape):
    student, teacher, lower, upper = case(shape)
    options = {"rest": rest, "quantile": quantile, "keep_target": keep_target}
    ours = losses.dac_kl(student, teacher, lower, upper, parts=DIVERGENCES[name][0], **options)

    def twin(lower, upper):
        return naive.rows(
            naive.dac_kl, student, teacher, lower.double(), upper.double(), name=name, **options
        )

    theirs = twin(lower, upper)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)
    weights = torch.linspace(1, 2, len(ours))
    grads = torch.autograd.grad((ours * weights).sum(), (student, lower, upper))
    expected = torch.autograd.grad((theirs * weights).sum(), (student, lower, upper))
    torch.testing.assert_close(grads, expected, rtol=1e-3, atol=1e-5)

    with torch.no_grad():
        low, high = lower.double(), upper.double()
        by_lower = (twin(low + STEP, high) - twin(low - STEP, high)) / (2 * STEP)
        by_upper = (twin(low, high + STEP) - twin(low, high - STEP)) / (2 * STEP)
    torch.testing.assert_close(grads[1].double(), by_lower * weights, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(grads[2].double(), by_upper * weights, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("quantile", QUANTILES)
def test_kept_mass_and_classes_equal_the_naive_twin(quantile):
    student, teacher, lower, upper = case((3, 37))
    terms = losses.dac_terms(student, teacher, lower, upper, quantile=quantile)
    p = teacher.double().softmax(-1)
    m = torch.stack([naive.clip_mask(p[i], lower[i].double(), upper[i].double(), quantile) for i in range(3)])
    torch.testing.assert_close(terms.retained_mass.double(), (m * p).sum(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.retained_classes.double(), m.sum(-1), rtol=1e-3, atol=1e-3)
    assert not terms.retained_classes.requires_grad
    ours = torch.autograd.grad(terms.retained_mass.log().sum(), (lower, upper))
    theirs = torch.autograd.grad((m * p).sum(-1).log().sum(), (lower, upper))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_the_target_the_kept_mass_is_the_distance_of_the_levels():
    """In a vocabulary of real size, peaked and flat rows, also for levels deep in the tail."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(6, 20011, generator=generator) * torch.tensor([0.0, 0.1, 1, 2, 4, 8])[:, None]
    student = torch.randn(6, 20011, generator=generator)
    for low, high in ((0.0, 0.3), (1e-4, 0.9999), (0.5, 0.5)):
        lower, upper = torch.full((6,), low), torch.full((6,), high)
        terms = losses.dac_terms(student, teacher, lower, upper, keep_target=False)
        torch.testing.assert_close(terms.retained_mass, upper - lower, rtol=0, atol=2e-5)
        by_rank = losses.dac_terms(student, teacher, lower, upper, keep_target=False, quantile="rank")
        torch.testing.assert_close(by_rank.retained_classes / 20011, upper - lower, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_wide_open_is_the_divergence_itself_with_still_levels(shape, name):
    student, teacher, _, _ = case(shape)
    lower, upper = (level.requires_grad_() for level in open_levels(shape[0]))
    parts, whole = DIVERGENCES[name]
    expected = whole(student, teacher)
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    for rest, quantile in itertools.product(RESTS, QUANTILES):
        value = losses.dac_kl(student, teacher, lower, upper, rest=rest, quantile=quantile, parts=parts)
        exact = name == "forward_kl" and rest != "renormalize"
        torch.testing.assert_close(value, expected, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-6)
        grads = torch.autograd.grad(value.sum(), (student, lower, upper))
        torch.testing.assert_close(grads[0], gradient, rtol=1e-5, atol=1e-7 if exact else 1e-6)
        assert (grads[1] == 0).all() and (grads[2] == 0).all()


def test_levels_all_but_open_stay_still():
    """So little is clipped that the bucket is empty in fp32: its slope must cancel the edge class's own."""
    student, teacher, _, _ = case((3, 37))
    lower, upper = torch.full((3,), 1e-30, requires_grad=True), torch.ones(3)
    value = losses.dac_kl(student, teacher, lower, upper)
    torch.testing.assert_close(value, losses.forward_kl(student, teacher))
    (slope,) = torch.autograd.grad(value.sum(), lower)
    torch.testing.assert_close(slope, torch.zeros(3))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_bucket_lies_between_zero_and_the_divergence(name):
    parts, whole = DIVERGENCES[name]
    generator = torch.Generator().manual_seed(1)
    for scale in (0.1, 1.0, 5.0, 30.0):
        student, teacher, _, _ = case((50, 23), scale)
        levels = torch.rand(50, 2, generator=generator).sort(-1).values
        for quantile, keep_target in itertools.product(QUANTILES, [True, False]):
            options = {"quantile": quantile, "keep_target": keep_target, "parts": parts}
            value = losses.dac_kl(student, teacher, levels[:, 0], levels[:, 1], **options)
            assert (value >= -1e-6).all()
            assert (value <= whole(student, teacher) * (1 + 1e-5) + 1e-6).all()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("edge", ["exact", "sigmoid"])
@pytest.mark.parametrize("rest", RESTS)
def test_zero_with_zero_gradient_where_equal(rest, edge, name):
    student, _, lower, upper = case((40, 33))
    options = {"rest": rest, "edge": edge, "parts": DIVERGENCES[name][0]}
    value = losses.dac_kl(student, student.detach(), lower, upper, **options)
    torch.testing.assert_close(value, torch.zeros(40), rtol=0, atol=1e-6)
    grads = torch.autograd.grad(value.sum(), (student, lower, upper))
    if rest != "drop":
        torch.testing.assert_close(grads[0], torch.zeros(40, 33), rtol=0, atol=1e-6)
    torch.testing.assert_close(grads[1:], (torch.zeros(40), torch.zeros(40)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("edge", ["exact", "sigmoid"])
def test_neither_class_order_nor_a_constant_matters(edge):
    student, teacher, lower, upper = case((3, 37))
    teacher = teacher.round()  # ties, also at the top
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    value = losses.dac_kl(student, teacher, lower, upper, edge=edge, keep_target=False)
    grads = torch.autograd.grad(value.sum(), (student, lower, upper))
    moved = losses.dac_kl(
        (student + 7)[:, order], (teacher - 3)[:, order], lower, upper, edge=edge, keep_target=False
    )
    torch.testing.assert_close(moved, value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(moved.sum(), (student, lower, upper)), grads, rtol=1e-3, atol=1e-4
    )


def test_equal_classes_share_their_block():
    teacher = torch.tensor([0.5, 0.125, 0.125, 0.125, 0.125]).log()[None]
    student = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1]).log()[None].requires_grad_()
    lower, upper = torch.tensor([0.25], requires_grad=True), torch.tensor([1.0])
    terms = losses.dac_terms(student, teacher, lower, upper)
    # Half of the block of four is clipped, from each of the four alike.
    torch.testing.assert_close(terms.retained_mass, torch.tensor([0.75]))
    torch.testing.assert_close(terms.retained_classes, torch.tensor([3.0]))
    (slope,) = torch.autograd.grad(terms.retained_mass.sum(), lower)
    torch.testing.assert_close(slope, torch.tensor([-1.0]))


def extreme_teachers() -> dict[str, torch.Tensor]:
    one_hot = torch.full((3, 9), -torch.inf)
    one_hot[:, 4] = 0.0
    barred = torch.randn(3, 9, generator=torch.Generator().manual_seed(5))
    barred[:, 6:] = -torch.inf
    steep = 1e4 * torch.randn(3, 9, generator=torch.Generator().manual_seed(6))
    return {"uniform": torch.zeros(3, 9), "one_hot": one_hot, "barred": barred, "steep": steep}


@pytest.mark.parametrize("name", sorted(extreme_teachers()))
@pytest.mark.parametrize(("edge", "rest"), list(itertools.product(["exact", "sigmoid"], RESTS)))
def test_extreme_logits_give_finite_values_and_gradients(name, edge, rest):
    students = torch.cat(list(extreme_teachers().values()))
    pairs = [(0.0, 1.0), (0.004, 0.996), (0.5, 0.5), (0.0, 0.0), (1.0, 1.0), (0.1, 1.0)]
    lower, upper = torch.tensor(pairs).repeat_interleave(len(students), 0).unbind(-1)
    leaves = [leaf.clone().requires_grad_() for leaf in (students.repeat(len(pairs), 1), lower, upper)]
    teacher = extreme_teachers()[name].repeat(4 * len(pairs), 1)
    for quantile, keep_target in itertools.product(QUANTILES, [True, False]):
        options = {"quantile": quantile, "rest": rest, "edge": edge, "keep_target": keep_target}
        terms = losses.dac_terms(leaves[0], teacher, leaves[1], leaves[2], **options)
        mass = terms.retained_mass.clamp(min=1e-6).log()
        grads = torch.autograd.grad((terms.divergence - mass).sum(), leaves)
        assert all(x.isfinite().all() for x in (*terms, *grads))
        if rest != "drop":
            assert (terms.divergence >= -1e-6).all()


def test_keep_target_keeps_the_argmax_and_nothing_else():
    student, teacher, _, _ = case((3, 37))
    shut = torch.zeros(3)
    kept = losses.dac_terms(student, teacher, shut, shut)
    torch.testing.assert_close(kept.retained_classes, torch.ones(3))
    torch.testing.assert_close(kept.retained_mass, teacher.softmax(-1).amax(-1))
    nothing = losses.dac_terms(student, teacher, shut, shut, keep_target=False)
    assert (nothing.retained_classes == 0).all()
    torch.testing.assert_close(nothing.divergence, torch.zeros(3), rtol=0, atol=1e-6)


def test_of_equal_classes_the_first_is_the_target():
    generator = torch.Generator().manual_seed(3)
    for size in (5, 64, 129, 1000, 4099):
        values = torch.randint(0, 4, (200, size), generator=generator).float()
        values[:50] = 1.0
        values[50:60] = -torch.inf
        values[60:70, -1] = 9.0
        assert torch.equal(first_largest(values), values.argmax(-1))


def test_with_the_target_kept_the_upper_level_cuts_only_what_is_below_it():
    teacher = torch.randn(300, 211, generator=torch.Generator().manual_seed(4))
    teacher[:200] *= 3
    student, most = torch.zeros_like(teacher), teacher.softmax(-1).amax(-1)
    at = [torch.full((300,), level) for level in (0.05, 0.95, 1.0)]
    both, tail = (losses.dac_kl(student, teacher, at[0], upper) for upper in at[1:])
    inert = most > 0.05 + 1e-6
    assert 200 <= inert.sum() < 290
    torch.testing.assert_close(both[inert], tail[inert], rtol=1e-6, atol=1e-7)
    assert (both[~inert] - tail[~inert]).abs().min() > 1e-5


def test_a_sharp_sigmoid_edge_comes_near_the_exact_one():
    student, teacher, lower, upper = case((40, 101))
    exact = losses.dac_terms(student, teacher, lower, upper)
    errors = []
    for sharpness in (1.0, 4.0, 50.0):
        soft = losses.dac_terms(student, teacher, lower, upper, edge="sigmoid", sharpness=sharpness)
        errors.append((soft.retained_mass - exact.retained_mass).abs().mean().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05
    assert (losses.dac_kl(student, teacher, *open_levels(40), edge="sigmoid") != 0).all()


@pytest.mark.parametrize("rest", RESTS)
def test_sigmoid_gradients_equal_finite_differences(rest):
    student, teacher, lower, upper = case((3, 16))

    def value(student, lower, upper):
        return losses.dac_kl(student, teacher, lower, upper, edge="sigmoid", rest=rest).sum()

    grads = torch.autograd.grad(value(student, lower, upper), (student, lower, upper))
    generator = torch.Generator().manual_seed(2)
    for which, gradient in enumerate(grads):
        inputs = [student.detach(), lower.detach(), upper.detach()]
        direction = torch.randn(gradient.shape, generator=generator)
        step = 1e-3 * direction
        up, down = list(inputs), list(inputs)
        up[which], down[which] = inputs[which] + step, inputs[which] - step
        slope = (value(*up) - value(*down)) / 2e-3
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=0.02, atol=0.005)


@pytest.mark.parametrize("edge", ["exact", "sigmoid"])
def test_no_rows_keep_the_graph(edge):
    student = torch.randn(0, 7, requires_grad=True)
    lower, upper = torch.zeros(0, requires_grad=True), torch.ones(0, requires_grad=True)
    terms = losses.dac_terms(student, torch.randn(0, 7), lower, upper, edge=edge)
    assert terms.divergence.shape == terms.retained_mass.shape == (0,)
    terms.divergence.sum().backward()
    assert student.grad is not None and lower.grad is not None and upper.grad is not None


def test_bf16_comes_near_and_nan_comes_through():
    student, teacher, lower, upper = case((40, 101))
    value = losses.dac_kl(student.bfloat16(), teacher.bfloat16(), lower, upper)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, losses.dac_kl(student, teacher, lower, upper), rtol=0.05, atol=0.05)
    value.sum().backward()
    assert student.grad is not None and student.grad.dtype == torch.float32
    teacher[3, 5] = torch.nan
    broken = losses.dac_kl(student, teacher, lower, upper)
    assert broken.isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lower": torch.zeros(3)}, r"lower must be .* \(\[4\]\)"),
        ({"upper": torch.ones(4, dtype=torch.long)}, "upper must be"),
        ({"lower": torch.full((4,), 0.9), "upper": torch.full((4,), 0.8)}, "0 <= lower <= upper <= 1"),
        ({"upper": torch.full((4,), 1.1)}, "0 <= lower <= upper <= 1"),
        ({"teacher_logits": torch.zeros(4, 15)}, "one shape"),
        ({"rest": "keep"}, "rest must be one of bucket, drop, renormalize"),
        ({"quantile": "median"}, "quantile must be one of mass, rank"),
        ({"edge": "soft"}, "edge must be one of exact, sigmoid"),
        ({"edge": "sigmoid", "sharpness": 0.0}, "sharpness must be positive"),
    ],
)
def test_wrong_input_is_refused_with_a_reason(change, says, monkeypatch):
    # As a user runs it: without the shape checks that conftest.py switches on.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    student, teacher, lower, upper = case((4, 16))
    inputs = {"student_logits": student, "teacher_logits": teacher, "lower": lower, "upper": upper}
    with pytest.raises(ValueError, match=says):
        losses.dac_kl(**(inputs | change))
