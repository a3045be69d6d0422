"""Weights, counts and temperature act once each; watchers speak once; reading references agrees with the model."""

from typing import get_args

import pytest
import torch
from tiny import tiny_llama

from redistill import losses
from redistill.batch import Counts
from redistill.config import DacSettings, ObjectiveSettings
from redistill.objective import Objective, TermWatch, reference_scores
from redistill.sample import Sample

COUNTS = Counts(sft=7.0, token=5.0, span=2.0)
TARGETS, SPANS = torch.tensor([1, 4, 0, 2, 3]), torch.tensor([0, 0, -1, 1, 1])


def logits(seed):
    return 2 * torch.randn(5, 11, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "skewed_reverse_kl"])
def test_weighted_sum_divided_by_the_counts_of_the_step(name):
    settings = ObjectiveSettings(
        sft_weight=0.5,
        token_weight=2.0,
        span_weight=3.0,
        token_loss=name,
        temperature=1.7,
        beta=0.2,
        alpha=0.3,
    )
    student, teacher = logits(0), logits(1)
    loss, stats = Objective(settings)(student, teacher, TARGETS, SPANS, True, COUNTS)
    cooled = student / 1.7, teacher / 1.7
    own = {"forward_kl": (), "jensen_shannon": (0.2,), "skewed_reverse_kl": (0.3,)}[name]
    token = losses.DIVERGENCES[name](*cooled, *own).sum()
    span = losses.span_correlation(*cooled, SPANS).sum()
    sft = torch.nn.functional.cross_entropy(student, TARGETS, reduction="sum")
    torch.testing.assert_close(loss, 0.5 * sft / 7 + 2.0 * token / 5 + 3.0 * span / 2)
    torch.testing.assert_close(stats["kl"], losses.forward_kl(student, teacher))
    torch.testing.assert_close(stats["span"], span)


def test_where_nothing_is_distilled_only_the_reference_is_fitted():
    loss, stats = Objective(ObjectiveSettings())(logits(0), None, TARGETS, SPANS, True, COUNTS)
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(logits(0), TARGETS, reduction="sum") / 7
    )
    assert set(stats) == {"sft"}


def test_coverage_moves_the_clip_network_and_not_the_student():
    student = logits(0).requires_grad_()
    gradients = []
    for coverage in (0.0, 5.0):
        settings = ObjectiveSettings.model_validate({"sft_weight": 0.0, "dac": {"coverage": coverage}})
        objective = Objective(settings, torch.Generator().manual_seed(0))
        loss, _ = objective(student, logits(1), TARGETS, SPANS, False, COUNTS)
        gradients.append(torch.autograd.grad(loss, [student, *objective.parameters()], allow_unused=True))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert any(not torch.equal(a, b) for a, b in zip(gradients[0][1:], gradients[1][1:], strict=True))


CLIPPED = get_args(DacSettings.model_fields["divergence"].annotation)


@pytest.mark.parametrize("name", CLIPPED)
def test_fixed_levels_have_no_network_and_open_ones_are_the_divergence_that_is_clipped(name):
    dac = {"learnable": False, "divergence": name}
    fields = {"sft_weight": 0.0, "span_weight": 0.0, "beta": 0.2, "alpha": 0.3}
    clipped = Objective(ObjectiveSettings.model_validate(fields | {"token_loss": "dac_kl", "dac": dac}))
    whole = Objective(ObjectiveSettings.model_validate(fields | {"token_loss": name}))
    values = [o(logits(0), logits(1), TARGETS, SPANS, False, COUNTS)[0] for o in (clipped, whole)]
    assert not list(clipped.parameters())
    torch.testing.assert_close(*values)


def test_a_term_that_is_not_felt_is_said_once():
    watch = TermWatch(ObjectiveSettings(), patience=3)
    said = [watch.update({"sft": 2.0, "token": 1.0, "span": 0.001}) for _ in range(6)]
    assert [len(lines) for lines in said] == [0, 0, 1, 0, 0, 0] and "objective.span_weight" in said[2][0]
    quiet = TermWatch(ObjectiveSettings(), patience=3)
    for span in (0.001, 0.001, 0.1) * 3:
        assert quiet.update({"sft": 2.0, "token": 1.0, "span": span}) == []
    (line,) = quiet.update({"sft": 2.0, "token": 1.0, "span": 0.1, "retained_classes": 1.0})
    assert "objective.dac.coverage" in line
    assert quiet.update({"retained_classes": 1.0}) == []


def test_reference_scores_are_the_models_own():
    student, teacher = tiny_llama(seed=1), tiny_llama(seed=2, layers=3)
    samples = [Sample((5, 9, 11), (40, 7, 2)), Sample((8,), (300, 2)), Sample((4, 4), ())]
    got = reference_scores(student, teacher, samples, 384, batch_size=2, slice_size=2)
    kl = nll = 0.0
    for sample in samples[:2]:
        ids = torch.tensor([sample.prompt + sample.response])
        q, p = (
            m(ids).logits[0, len(sample.prompt) - 1 : -1].double().log_softmax(-1) for m in (student, teacher)
        )
        kl += float((p.exp() * (p - q)).sum())
        nll -= float(q[range(len(sample.response)), list(sample.response)].sum())
    assert got == {
        "kl": pytest.approx(kl / 5, rel=1e-4),
        "nll": pytest.approx(nll / 5, rel=1e-4),
        "tokens": 5.0,
    }
    assert reference_scores(student, student, samples, 384, 4)["kl"] == pytest.approx(0, abs=1e-6)
