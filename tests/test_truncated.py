"""A teacher cut down to k classes and a tail: the objective on it against twins in float64, and what must hold."""

import naive
import naive_objective
import pytest
import torch
from tiny import VOCAB, tiny_llama
from torch import Tensor

from redistill.batch import Counts
from redistill.config import ObjectiveSettings
from redistill.losses import forward_kl
from redistill.losses.truncated import fold, fold_logs, unfold
from redistill.objective import Objective
from redistill.sample import Sample
from redistill.scoring import score
from redistill.teachers.signal import TopK, most_probable

ONE = Counts(1.0, 1.0, 1.0)
F_DIVERGENCES = [
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "total_variation",
]
OTHERS = ["adaptive_kl", "todi", "alpha_beta"]
DAC = [
    {"divergence": name, "quantile": quantile, "rest": rest, "lower": lower, "upper": upper}
    for name, quantile, rest, lower, upper in [
        ("forward_kl", "mass", "bucket", 0.004, 0.996),
        ("forward_kl", "mass", "bucket", 0.3, 0.7),
        ("forward_kl", "rank", "bucket", 0.4, 1.0),
        ("jensen_shannon", "mass", "bucket", 0.1, 0.9),
        ("reverse_kl", "rank", "renormalize", 0.9, 0.999),
        ("skewed_forward_kl", "mass", "drop", 0.05, 0.8),
        ("total_variation", "mass", "bucket", 0.2, 1.0),
    ]
]


def settings(**changes) -> ObjectiveSettings:
    return ObjectiveSettings(**{"sft_weight": 0.0, "span_weight": 0.0, "token_loss": "forward_kl", **changes})


def pair(rows: int, size: int, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = scale * torch.randn(rows, size, generator=generator)
    return teacher + torch.randn(rows, size, generator=generator), teacher


def part_of(chosen: ObjectiveSettings, student: Tensor, teacher: Tensor | TopK, **more):
    rows = len(student)
    targets, spans = torch.zeros(rows, dtype=torch.long), torch.full((rows,), -1)
    given = {"targets": targets, "spans": spans, "sft": False, "counts": ONE, **more}
    return Objective(chosen, torch.Generator().manual_seed(0))(student, teacher, **given)


def spread(logs: Tensor, ids: Tensor) -> Tensor:
    """log p over V, with the tail's mass shared out evenly among its classes: what one outcome cannot tell apart."""
    kept = torch.zeros_like(logs, dtype=torch.bool).scatter(1, ids, True)
    number = (~kept).sum(-1, keepdim=True)
    even = logs.masked_fill(kept, -torch.inf).logsumexp(-1, keepdim=True) - number.log()
    return torch.where(kept, logs, even)


def twin(chosen: ObjectiveSettings, student: Tensor, teacher: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The token loss of evenly spread tails, dense and in float64, and its gradient."""
    leaf = student.double().requires_grad_()
    log_q, log_p = (spread(each.log_softmax(-1), ids) for each in (leaf, teacher.double()))
    if chosen.token_loss == "dac_kl":
        levels = tuple(log_p.new_full((len(log_p),), level) for level in (chosen.dac.lower, chosen.dac.upper))
        value = naive_objective.dac_kl(chosen, log_p, log_q, levels).sum()
    else:
        value = naive_objective.per_class(chosen.token_loss, chosen.alpha, chosen.beta)(log_p, log_q).sum()
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def folded_twin(chosen: ObjectiveSettings, student: Tensor, teacher: Tensor, ids: Tensor):
    """The token loss of k + 1 classes in float64, for what is no sum of parts."""
    leaf = student.double().requires_grad_()
    logs = []
    for each in (leaf.softmax(-1), teacher.double().softmax(-1)):
        kept = each.gather(1, ids)
        tail = each.scatter(1, ids, 0.0).sum(-1, keepdim=True)
        logs.append(torch.cat((kept, tail), 1).log())
    log_q, log_p = logs
    value = naive_objective.per_class(chosen.token_loss, chosen.alpha, chosen.beta)(log_p, log_q).sum()
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def assert_near(part, value: Tensor, gradient: Tensor) -> None:
    torch.testing.assert_close(part.loss.double(), value, rtol=2e-5, atol=2e-6)
    assert (part.by_logits - gradient).norm() <= 5e-5 * gradient.norm() + 1e-6


SHAPES = [(5, 101, 1), (3, 64, 7), (4, 130, 129), (1, 257, 40)]


@pytest.mark.parametrize(("rows", "size", "k"), SHAPES)
@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_a_divergence_is_that_of_the_twin_with_even_tails(name, rows, size, k):
    chosen, (student, teacher) = settings(token_loss=name), pair(rows, size)
    cut = most_probable(teacher, k)
    assert cut.ids.shape == (rows, k) and torch.equal(
        cut.log_p[:, :k], cut.log_p[:, :k].sort(-1, True).values
    )
    assert_near(part_of(chosen, student, cut), *twin(chosen, student, teacher, cut.ids))


@pytest.mark.parametrize(("rows", "size", "k"), SHAPES)
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_f_divergence_is_that_of_k_and_one_classes(name, rows, size, k):
    chosen, (student, teacher) = settings(token_loss=name), pair(rows, size)
    cut = most_probable(teacher, k)
    assert_near(part_of(chosen, student, cut), *folded_twin(chosen, student, teacher, cut.ids))


@pytest.mark.parametrize(("rows", "size", "k"), SHAPES)
@pytest.mark.parametrize("dac", DAC, ids=lambda dac: "-".join(map(str, dac.values())))
def test_dac_kl_has_the_tail_where_its_classes_lie(dac, rows, size, k):
    """The clip of V classes with even tails is the clip of k + 1 classes: the tail is the least, and a block."""
    chosen = settings(token_loss="dac_kl", dac={"learnable": False, **dac})
    student, teacher = pair(rows, size)
    cut = most_probable(teacher, k)
    assert_near(part_of(chosen, student, cut), *twin(chosen, student, teacher, cut.ids))


@pytest.mark.parametrize(("quantile", "edge"), [("mass", "exact"), ("rank", "exact"), ("mass", "sigmoid")])
def test_with_its_network_dac_kl_is_the_dense_one_when_every_class_is_kept(quantile, edge):
    dac = {"quantile": quantile, "edge": edge, "coverage": 0.1}
    chosen, (student, teacher) = settings(token_loss="dac_kl", dac=dac), pair(6, 90)
    dense, cut = (part_of(chosen, student, each) for each in (teacher, most_probable(teacher, 90)))
    torch.testing.assert_close(cut.loss, dense.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cut.by_logits, dense.by_logits, rtol=1e-4, atol=1e-6)
    for one, other in zip(cut.by_parameters, dense.by_parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    few = part_of(chosen, student, most_probable(teacher, 3))
    assert all(torch.isfinite(each).all() for each in few.by_parameters)
    assert any(each.abs().sum() > 0 for each in few.by_parameters)


@pytest.mark.parametrize("k", [1, 3, 50, 89])
@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_never_more_than_dense_and_nothing_between_equals(name, k):
    chosen, (student, teacher) = settings(token_loss=name), pair(40, 90, scale=3.0)
    cut = most_probable(teacher, k)
    dense, less = (part_of(chosen, student, each) for each in (teacher, cut))
    assert 0 < less.loss <= dense.loss * (1 + 1e-6)
    same = part_of(chosen, teacher, cut)
    assert abs(same.loss) < 1e-5 and same.by_logits.abs().max() < 1e-6


@pytest.mark.parametrize("name", [*F_DIVERGENCES, *OTHERS])
def test_all_classes_kept_is_the_dense_loss(name):
    chosen, (student, teacher) = settings(token_loss=name), pair(5, 77)
    for k in (77, 1000):
        cut = part_of(chosen, student, most_probable(teacher, k))
        dense = part_of(chosen, student, teacher)
        torch.testing.assert_close(cut.loss, dense.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(cut.by_logits, dense.by_logits, rtol=1e-4, atol=1e-6)


EXTREME = {
    "teacher's tail vanishes": (torch.tensor([[0.0, 1.0, -60.0, -70.0]]), torch.tensor([[0.0, 2.0, 1.0, 0.0]])),
    "student's tail vanishes": (torch.tensor([[0.0, 1.0, 0.5, -1.0]]), torch.tensor([[0.0, 2.0, -80.0, -95.0]])),
    "the tail is all": (torch.tensor([[1e-3, 0.0, 0.0, 0.0] * 500]), torch.tensor([[0.0, 0.0, 0.0, 1e-3] * 500])),
    "both vanish": (torch.tensor([[0.0, 3.0, -90.0, -91.0]]), torch.tensor([[1.0, 0.0, -91.0, -90.0]])),
}  # fmt: skip


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("case", EXTREME)
def test_tails_of_any_size(case, name):
    teacher, student = EXTREME[case]
    chosen, cut = settings(token_loss=name), most_probable(teacher, 2)
    assert_near(part_of(chosen, student, cut), *twin(chosen, student, teacher, cut.ids))


def test_folding_goes_there_and_back():
    logits, teacher = pair(7, 33)
    for k in (1, 5, 32, 33):
        ids = most_probable(teacher, k).ids
        leaf = logits.double().requires_grad_()
        folded = fold(leaf, ids)
        exact = logits.double().exp().scatter(1, ids, 0.0).sum(-1)
        torch.testing.assert_close(folded[:, :-1], logits.double().gather(1, ids))
        if k < 33:
            torch.testing.assert_close(folded[:, -1].exp(), exact)
        upstream = torch.linspace(-1, 1, k + 1).double().expand_as(folded)
        (wanted,) = torch.autograd.grad((folded * upstream).sum(), leaf)
        found = fold_logs(logits, ids)
        torch.testing.assert_close(
            unfold(upstream.float(), ids, found.share).double(), wanted, atol=1e-6, rtol=1e-5
        )
        assert torch.isfinite(wanted).all()
    # The public losses take what `fold` gives.
    cut = most_probable(teacher, 5)
    part = part_of(settings(), logits, cut)
    torch.testing.assert_close(forward_kl(fold(logits, cut.ids), cut.log_p).sum(), part.loss)


def test_the_other_terms_beside_it():
    """SFT sees all of V; the span loss the classes that both neighbours kept, so that it is never more than dense."""
    student, teacher = pair(6, 60)
    targets, spans = torch.tensor([0, 5, 9, 11, 59, 3]), torch.tensor([0, 0, 0, -1, 1, 1])
    given = {"targets": targets, "spans": spans, "sft": True}
    cut = most_probable(teacher, 8)
    part = part_of(settings(sft_weight=1.0, token_weight=0.0), student, cut, **given)
    torch.testing.assert_close(part.loss, -student.log_softmax(-1)[range(6), targets].sum())
    chosen = settings(token_weight=0.0, span_weight=1.0)
    part = part_of(chosen, student, cut, **given)
    leaf = student.double().requires_grad_()
    kept = torch.zeros_like(teacher, dtype=torch.bool).scatter(1, cut.ids, True)
    p, q = (torch.where(kept, each.softmax(-1), 0.0) for each in (teacher.double(), leaf))
    gaps = [(p[i] * p[i + 1] - q[i] * q[i + 1])[kept[i] & kept[i + 1]].norm() for i in (0, 1, 4)]
    value = (gaps[0] + gaps[1]) / 2 + gaps[2]
    assert_near(part, value.detach(), torch.autograd.grad(value, leaf)[0])
    dense = naive.span_correlation(student.double(), teacher.double(), spans.tolist(), "norm").sum()
    assert 0 < part.loss <= dense
    whole = part_of(chosen, student, most_probable(teacher, 60), **given)
    torch.testing.assert_close(whole.loss.double(), dense, rtol=1e-4, atol=1e-6)


def test_what_is_logged_of_a_token_is_its_class():
    student, teacher = pair(3, 50)
    cut = most_probable(teacher, 4)
    targets = torch.stack((cut.ids[0, 2], teacher[1].argmin(), cut.ids[2, 0]))
    stats = part_of(settings(), student, cut, targets=targets).stats
    assert stats["teacher_log_likelihood"].tolist() == pytest.approx(
        [float(cut.log_p[0, 2]), float(cut.log_p[1, 4]), float(cut.log_p[2, 0])]
    )
    torch.testing.assert_close(stats["kl"].sum(), stats["token"])


def test_another_temperature_is_refused():
    student, teacher = pair(2, 20)
    with pytest.raises(ValueError, match=r"objective\.temperature"):
        part_of(settings(temperature=2.0), student, most_probable(teacher, 3))


class Cut:
    """A teacher of which only the k most probable ids are known."""

    def __init__(self, model, k):
        self.inner, self.k, self.model, self.vocabulary = model, k, None, VOCAB

    def signal(self, samples):
        logits = []
        for each in samples:
            ids = torch.tensor([each.prompt + each.response])
            with torch.no_grad():
                logits.append(self.inner(ids).logits[0, len(each.prompt) - 1 : -1])
        return most_probable(torch.cat(logits), self.k)


def test_scores_beside_a_truncated_teacher():
    student, teacher = tiny_llama(seed=1), tiny_llama(seed=2, layers=3)
    samples = [Sample((5, 9, 11), (40, 7, 2)), Sample((8,), (300, 2))]
    how = {"vocabulary": VOCAB, "batch_size": 2, "generator": torch.Generator().manual_seed(0)}
    dense = score(student, teacher, samples, teacher_token="argmax", **how)
    for k in (1, 20, VOCAB):
        found = score(student, Cut(teacher, k), samples, teacher_token="argmax", **how)
        for one, other in zip(found, dense, strict=True):
            assert one.teacher_token.equal(other.teacher_token)
            assert (one.kl <= other.kl + 1e-5).all() and (
                one.teacher_log_likelihood >= other.teacher_log_likelihood - 1e-5
            ).all()
            if k == VOCAB:
                torch.testing.assert_close(one.kl, other.kl, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(one.reward, other.reward, rtol=1e-4, atol=1e-4)
        ids = [set(row.tolist()) for row in Cut(teacher, k).signal(samples).ids]
        for sample, one in zip(samples, found, strict=True):
            text = torch.tensor([sample.prompt + sample.response])
            with torch.no_grad():
                p, q = (
                    m(text).logits[0, len(sample.prompt) - 1 : -1].double().softmax(-1)
                    for m in (teacher, student)
                )
            for place, said in enumerate(sample.response):
                kept = ids.pop(0)
                same = [said] if said in kept else sorted(set(range(VOCAB)) - kept)
                wanted = float((p[place, same].sum() / q[place, same].sum()).log())
                assert float(one.reward[place]) == pytest.approx(wanted, abs=1e-4)
    drawn = score(student, Cut(teacher, 3), samples, teacher_token="sample", **how)
    kept = Cut(teacher, 3).signal(samples).ids
    assert all(
        token in row
        for token, row in zip(torch.cat([each.teacher_token for each in drawn]), kept, strict=True)
    )
