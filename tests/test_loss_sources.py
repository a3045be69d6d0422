"""Every divergence against those who published it, on the same logits.

TRL and liger run as they are installed. What exists only as authors' scripts is stated here anew, in float64, with
a pointer to the file, so that a reader can hold the statement against it: value and gradient must be ours, or differ
by exactly what is named. `q`, `p`: student and teacher probabilities [N, V]; `lam`, `mu`: the authors' names.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from redistill import losses


def pair(rows: int = 6, classes: int = 101, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    student, teacher = (scale * torch.randn(rows, classes, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


def probabilities(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return student.double().softmax(-1), teacher.double().softmax(-1)


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum(-1)


def assert_same(ours: Tensor, theirs: Tensor, *inputs: Tensor) -> None:
    """Values, and the gradients of a weighted sum with respect to `inputs`."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, check_dtype=False)
    weights = torch.linspace(1, 2, len(ours))
    gradients = torch.autograd.grad((ours * weights).sum(), inputs)
    expected = torch.autograd.grad((theirs * weights).sum(), inputs)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, check_dtype=False)


def distillm_reverse_kl(q: Tensor, p: Tensor) -> Tensor:
    """jongwooko/distillm, distillm/losses.py, reverse_kl."""
    return -(q * p.log() - q * q.log()).sum(-1)


def minillm_regularizer(q: Tensor, p: Tensor) -> Tensor:
    """microsoft/LMOps, minillm/minillm/losses.py, _reg_loss (the single-step term): cross-entropy less entropy."""
    return -(q * p.log()).sum(-1) - entropy(q)


def distillm_js(q: Tensor, p: Tensor, lam: float = 0.9) -> Tensor:
    """jongwooko/distillm, distillm/losses.py, js_distance: `lam` belongs to the student."""
    mixture = (1 - lam) * p + lam * q
    to_student = (q * (q / mixture).log()).sum(-1)
    return lam * to_student + (1 - lam) * (p * (p / mixture).log()).sum(-1)


def distillm_skewed_reverse_kl(q: Tensor, p: Tensor, lam: float = 0.1) -> Tensor:
    """jongwooko/distillm, distillm/losses.py, skewed_reverse_kl: `lam` is the student's share of the mixture."""
    return (q * (q.log() - ((1 - lam) * p + lam * q).log())).sum(-1)


def dskd_skewed_forward_kl(q: Tensor, p: Tensor, lam: float = 0.1) -> Tensor:
    """songmzhang/DSKD, code/criterions/various_divergence.py, compute_skewed_forward_kl_divergence."""
    return (p * (p.log() - (lam * p + (1 - lam) * q).log())).sum(-1)


def half_l1(q: Tensor, p: Tensor) -> Tensor:
    """MANGA-UOFA/fdistill, dart/kd.py, calc_tvd_loss, and jongwooko/distillm, tv_distance."""
    return (0.5 * (p - q).abs()).sum(-1)


def sorted_gaps(q: Tensor, p: Tensor, descending: bool) -> tuple[Tensor, Tensor]:
    by_rank, order = p.sort(-1, descending=descending)
    return by_rank.cumsum(-1), (by_rank - q.detach().gather(-1, order)).abs()


def mixed_kl(q: Tensor, p: Tensor, head_share: Tensor) -> Tensor:
    return head_share * (p * (p / q).log()).sum(-1) + (1 - head_share) * (q * (q / p).log()).sum(-1)


def dskd_adaptive_kl(q: Tensor, p: Tensor, alpha: float = 0.5) -> Tensor:
    """songmzhang/DSKD, code/criterions/various_divergence.py, compute_adaptive_kl_divergence (ToDi's code too).

    Sorted upwards, the tail is what holds at most `alpha`; so the class that crosses is of the head.
    """
    mass, gap = sorted_gaps(q, p, descending=False)
    return mixed_kl(q, p, (gap * (mass > alpha)).sum(-1) / gap.sum(-1))


def released_adaptive_kl(q: Tensor, p: Tensor, mu: float = 0.5) -> Tensor:
    """wutaiqiang/LLM_KD_AKL, AKL.py, get_ratio (and ABKD's copy): the head holds at most `mu`, or the first class."""
    mass, gap = sorted_gaps(q, p, descending=True)
    head = mass <= mu
    head[:, 0] = True
    return mixed_kl(q, p, (gap * head).sum(-1) / gap.sum(-1))


def todi(q: Tensor, p: Tensor) -> Tensor:
    """jungseongryong/ToDi, code/criterions/various_divergence.py, compute_ToDi (no beta: 1)."""
    up = torch.sigmoid(p.log() - q.log()).detach()
    down = torch.sigmoid(q.log() - p.log()).detach()
    return (up * p * (p.log() - q.log()) + down * q * (q.log() - p.log())).sum(-1)


def abkd(q: Tensor, p: Tensor, alpha: float, beta: float) -> Tensor:
    """ghwang-s/abkd, distillation_llm/distillm/losses.py, ab_div: its branches for powers of at least 0."""
    if alpha == 0 and beta == 0:
        return 0.5 * ((q.log() - p.log()) ** 2).sum(-1)
    if alpha == 0:
        return (q**beta * (q**beta / p**beta).log() - q**beta + p**beta).sum(-1) / beta
    if beta == 0:
        return (p**alpha * (p**alpha / q**alpha).log() - p**alpha + q**alpha).sum(-1) / alpha
    s = alpha + beta
    inner = p**alpha * q**beta - alpha / s * p**s - beta / s * q**s
    return -inner.sum(-1) / (alpha * beta)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (losses.reverse_kl, distillm_reverse_kl),
        (losses.reverse_kl, minillm_regularizer),
        # Our beta is their 1 - lam, so that their default 0.9 is our 0.1.
        (partial(losses.jensen_shannon, beta=0.1), distillm_js),
        (partial(losses.jensen_shannon, beta=0.7), partial(distillm_js, lam=0.3)),
        (losses.skewed_reverse_kl, distillm_skewed_reverse_kl),
        (partial(losses.skewed_reverse_kl, alpha=0.7), partial(distillm_skewed_reverse_kl, lam=0.7)),
        (losses.skewed_forward_kl, dskd_skewed_forward_kl),
        (partial(losses.skewed_forward_kl, alpha=0.7), partial(dskd_skewed_forward_kl, lam=0.7)),
        (losses.total_variation, half_l1),
        # Our mu, the mass of the head, is their 1 - alpha, the mass of the tail.
        (losses.adaptive_kl, dskd_adaptive_kl),
        (partial(losses.adaptive_kl, mu=0.8), partial(dskd_adaptive_kl, alpha=0.2)),
        (losses.todi, todi),
        # scripts/gpt2/ab/train_*.sh: alpha 0.2 of a sum of 0.9. scripts/openllama2 has 0.1 of 0.9.
        (losses.alpha_beta, partial(abkd, alpha=0.2, beta=0.7)),
        (partial(losses.alpha_beta, alpha=0.1, beta=0.8), partial(abkd, alpha=0.1, beta=0.8)),
        (partial(losses.alpha_beta, alpha=1.0, beta=0.0), partial(abkd, alpha=1, beta=0)),
        (partial(losses.alpha_beta, alpha=0.0, beta=1.0), partial(abkd, alpha=0, beta=1)),
        (partial(losses.alpha_beta, alpha=0.0, beta=0.0), partial(abkd, alpha=0, beta=0)),
    ],
)
def test_value_and_gradient_are_the_authors(ours, theirs):
    student, teacher = pair()
    assert_same(ours(student, teacher), theirs(*probabilities(student, teacher)), student)


@pytest.mark.parametrize(
    ("ours", "share"),
    [
        # jongwooko/distillm, distillm/losses.py, forward_kl; microsoft/LMOps, minillm/finetune.py,
        # get_distil_loss; pytorch/torchtune, torchtune/modules/loss/kd_losses.py, ForwardKLLoss.
        (losses.forward_kl, 0.0),
        # jongwooko/distillm, distillm/losses.py, skewed_forward_kl.
        (losses.skewed_forward_kl, 0.1),
        (partial(losses.skewed_forward_kl, alpha=0.7), 0.7),
    ],
)
def test_what_they_call_forward_kl_lacks_the_entropy_of_the_teacher(ours, share):
    student, teacher = pair()
    q, p = probabilities(student, teacher)
    theirs = -(p * (share * p + (1 - share) * q).log()).sum(-1)
    assert_same(ours(student, teacher), theirs - entropy(p), student)
    # So theirs is not 0 where student and teacher agree, and no size of disagreement can be read off it.
    q, p = probabilities(teacher, teacher)
    at_equality = -(p * (share * p + (1 - share) * q).log()).sum(-1)
    torch.testing.assert_close(at_equality, entropy(p))
    assert (at_equality > 2).all() and (ours(teacher, teacher).abs() < 1e-6).all()


def test_the_ends_of_the_mixture_are_nothing_to_distillm_and_the_two_kl_to_us():
    student, teacher = pair()
    q, p = probabilities(student, teacher)
    for lam, beta, plain in ((1.0, 0.0, losses.forward_kl), (0.0, 1.0, losses.reverse_kl)):
        assert distillm_js(q, p, lam).abs().max() < 1e-12
        torch.testing.assert_close(
            losses.jensen_shannon(student, teacher, beta=beta), plain(student, teacher), rtol=1e-5, atol=1e-6
        )


def test_the_released_adaptive_kl_leaves_the_class_that_reaches_mu_to_the_tail():
    student, teacher = pair(rows=60)
    q, p = probabilities(student, teacher)
    ours, theirs = losses.adaptive_kl(student, teacher).double(), released_adaptive_kl(q, p)
    alone = p.amax(-1) >= 0.5
    assert 0 < alone.sum() < 60
    torch.testing.assert_close(ours[alone], theirs[alone], rtol=1e-4, atol=1e-5)
    # Elsewhere their weight of forward KL lacks that class's share of the gap.
    mass, gap = sorted_gaps(q, p, descending=True)
    crossing = (mass < 0.5).sum(-1, keepdim=True)
    lacking = gap.gather(-1, crossing)[:, 0] / gap.sum(-1)
    kl_gap = mixed_kl(q, p, torch.ones(60)) - mixed_kl(q, p, torch.zeros(60))
    torch.testing.assert_close((ours - theirs)[~alone], (lacking * kl_gap)[~alone], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.0), (0.0, 0.25)])
def test_abkd_divides_its_limits_by_the_power_and_not_by_its_square(alpha, beta):
    student, teacher = pair()
    q, p = probabilities(student, teacher)
    ours = losses.alpha_beta(student, teacher, alpha=alpha, beta=beta)
    assert_same(ours, abkd(q, p, alpha, beta) / (alpha + beta), student)
    # Ours is what their general formula tends to.
    near = abkd(q, p, alpha or 1e-7, beta or 1e-7)
    torch.testing.assert_close(ours.double(), near, rtol=1e-4, atol=1e-5)


def test_abkd_has_no_gradient_where_a_probability_of_the_student_underflows():
    student = torch.tensor([[0.0, 0.0, -120.0]], requires_grad=True)
    teacher = torch.zeros(1, 3)
    theirs = abkd(student.softmax(-1), teacher.softmax(-1), 0.2, 0.7)
    ours = losses.alpha_beta(student, teacher)
    torch.testing.assert_close(ours, theirs)
    (lost,) = torch.autograd.grad(theirs.sum(), student)
    (kept,) = torch.autograd.grad(ours.sum(), student)
    assert lost.isnan().any() and kept.isfinite().all()


def test_the_scripts_leave_out_a_class_that_the_student_bars():
    student, teacher = pair()
    barred = student.detach().clone()
    barred[:, 7] = -torch.inf
    q, p = probabilities(barred, teacher)
    # `inf_mask` in jongwooko/distillm and its heirs: the teacher's mass there costs nothing.
    theirs = (0.5 * (p - q).abs()).masked_fill(barred.isinf(), 0).sum(-1)
    ours = losses.total_variation(barred, teacher)
    torch.testing.assert_close(ours.double(), theirs + 0.5 * p[:, 7], rtol=1e-5, atol=1e-6)
    # Forward KL, infinite by its formula, is for us huge by the teacher's mass there.
    assert (losses.forward_kl(barred, teacher) > 9e4 * p[:, 7]).all()


BETAS = [0.0, 0.3, 0.5, 1.0]


@pytest.mark.parametrize("beta", BETAS)
def test_jensen_shannon_equals_trl_on_logits(beta):
    from trl.experimental import gkd
    from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss

    student, teacher = pair()
    ours = losses.jensen_shannon(student, teacher, beta=beta)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, reduction="none")
    assert_same(ours, theirs[0].sum(-1), student)
    ours = losses.jensen_shannon(student, teacher, beta=beta)
    assert_same(
        ours, compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=beta), student
    )


def heads() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((6, 8), (101, 8), (6, 12), (101, 12))
    hidden, weight, other, other_weight = (torch.randn(shape, generator=generator) for shape in shapes)
    return hidden.requires_grad_(), weight.requires_grad_(), other, other_weight


@pytest.mark.parametrize("beta", BETAS)
def test_jensen_shannon_equals_the_chunked_loss_of_trl(beta):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, weight, other, other_weight = heads()
    ours = losses.jensen_shannon(hidden @ weight.T, other @ other_weight.T, beta=beta)
    theirs, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, other, other_weight, None, beta)
    assert_same(ours, theirs, hidden, weight)


@pytest.mark.parametrize("beta", BETAS)
def test_jensen_shannon_equals_liger(beta):
    # Not a test requirement: it asks for triton, 200 MB that a machine without a GPU has no use for. Its own code
    # here is plain torch, so an unpacked wheel on the path is enough; liger-kernel 0.8.5 passed so.
    liger = pytest.importorskip(
        "liger_kernel.chunked_loss.jsd_loss", reason="liger-kernel is not installed (not a dependency)"
    )
    hidden, weight, other, other_weight = heads()
    ours = losses.jensen_shannon(hidden @ weight.T, other @ other_weight.T, beta=beta)
    # The mean over positions that are not ignored; the hard loss is switched off.
    fused = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False, chunk_size=2
    )
    targets = torch.zeros(6, dtype=torch.long)
    theirs = fused(hidden, weight, other, other_weight, targets)
    assert_same(ours.mean()[None], theirs[None], hidden, weight)
