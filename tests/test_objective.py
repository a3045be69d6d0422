"""Weights, counts and temperature act once each; watchers speak once; reading references agrees with the model."""

from typing import get_args

import pytest
import torch
from tiny import tiny_llama

from redistill import losses
from redistill.batch import Counts
from redistill.config import DacSettings, ObjectiveSettings
from redistill.losses.f_divergences import f_divergence
from redistill.objective import Objective, Written, divergence
from redistill.sample import Sample
from redistill.scoring import reference_scores
from redistill.steplog import StepWatch

COUNTS = Counts(sft=7.0, token=5.0, span=2.0)
TARGETS, SPANS = torch.tensor([1, 4, 0, 2, 3]), torch.tensor([0, 0, -1, 1, 1])


def logits(seed):
    return 2 * torch.randn(5, 11, generator=torch.Generator().manual_seed(seed))


def plain_objective(settings, network, student, teacher, sft, written):
    """The same sum from the public losses, for autograd."""
    cooled = student / settings.temperature, teacher / settings.temperature
    loss = (
        settings.span_weight
        * losses.span_correlation(*cooled, SPANS, distance=settings.span.distance).sum()
        / 2
    )
    if sft:
        loss = loss + settings.sft_weight * losses.cross_entropy(student, TARGETS).sum() / 7
    if written:
        chosen = -losses.cross_entropy(student, TARGETS)
        policy = losses.policy_gradient(chosen, *written, clip=settings.policy.clip).sum()
        loss = loss + settings.policy.weight * policy / 5
    if settings.token_loss != "dac_kl":
        return loss + settings.token_weight * divergence(settings)(*cooled).sum() / 5
    dac = settings.dac
    levels = network(*cooled) if network else (torch.full((5,), dac.lower), torch.full((5,), dac.upper))
    terms = losses.dac_terms(
        *cooled, *levels, quantile=dac.quantile, rest=dac.rest, edge=dac.edge, keep_target=dac.keep_target,
        parts=f_divergence(dac.divergence, settings.alpha, settings.beta),
    )  # fmt: skip
    coverage = dac.coverage * terms.retained_mass.log().sum()  # moves the network, and is no part of the loss
    token = terms.divergence.sum() - (coverage - coverage.detach())
    return loss + settings.token_weight * token / 5


CASES = [
    {"token_loss": name} for name in get_args(ObjectiveSettings.model_fields["token_loss"].annotation)
] + [
    {"temperature": 1.7, "dac": {"coverage": 0.5}},
    {"temperature": 1.7, "token_loss": "todi", "span": {"distance": "squared"}},
    {"dac": {"rest": "drop", "quantile": "rank"}, "span": {"distance": "cosine"}},
    {"dac": {"rest": "renormalize", "divergence": "jensen_shannon", "coverage": 0.5}},
    {"dac": {"edge": "sigmoid", "keep_target": False, "divergence": "skewed_reverse_kl"}},
    {"dac": {"learnable": False, "lower": 0.2, "upper": 0.9, "divergence": "reverse_kl"}},
    {"policy": {"weight": 0.7}, "token_loss": "reverse_kl"},
]


@pytest.mark.parametrize("sft", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_all_gradients_are_those_of_the_weighted_public_losses(case, sft):
    fields = {"sft_weight": 0.5, "token_weight": 2.0, "span_weight": 3.0, "beta": 0.2, "alpha": 0.3}
    settings = ObjectiveSettings.model_validate(fields | case)
    objective = Objective(settings, torch.Generator().manual_seed(0))
    for parameter in objective.parameters():  # a network that has left its start, where levels are all alike
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    written = Written(torch.full((5,), -2.0), torch.linspace(-1, 1, 5)) if settings.policy.weight else None
    student, teacher = logits(0).requires_grad_(), logits(1)
    part = objective(student, teacher, TARGETS, SPANS, sft, COUNTS, written)
    expected = plain_objective(settings, objective.clip, student, teacher, sft, written)
    torch.testing.assert_close(part.loss, expected.detach(), rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(expected, [student, *objective.parameters()])
    torch.testing.assert_close([part.by_logits, *part.by_parameters], list(wanted), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(part.stats["kl"], losses.forward_kl(student, teacher).detach())
    assert not any(each.requires_grad for each in part.stats.values())


def test_where_nothing_is_distilled_only_the_reference_is_fitted():
    student = logits(0).requires_grad_()
    part = Objective(ObjectiveSettings())(student, None, TARGETS, SPANS, True, COUNTS)
    expected = torch.nn.functional.cross_entropy(student, TARGETS, reduction="sum") / 7
    torch.testing.assert_close(part.loss, expected.detach())
    torch.testing.assert_close([part.by_logits], list(torch.autograd.grad(expected, student)))
    assert set(part.stats) == {"sft"} and set(part.by_parameters) == {None}


def test_coverage_moves_the_clip_network_and_not_the_student():
    parts = []
    for coverage in (0.0, 5.0):
        settings = ObjectiveSettings.model_validate({"sft_weight": 0.0, "dac": {"coverage": coverage}})
        objective = Objective(settings, torch.Generator().manual_seed(0))
        parts.append(objective(logits(0), logits(1), TARGETS, SPANS, False, COUNTS))
    assert torch.equal(parts[0].by_logits, parts[1].by_logits)
    assert any(
        not torch.equal(a, b) for a, b in zip(parts[0].by_parameters, parts[1].by_parameters, strict=True)
    )


CLIPPED = get_args(DacSettings.model_fields["divergence"].annotation)


@pytest.mark.parametrize("name", CLIPPED)
def test_fixed_levels_have_no_network_and_open_ones_are_the_divergence_that_is_clipped(name):
    dac = {"learnable": False, "divergence": name}
    fields = {"sft_weight": 0.0, "span_weight": 0.0, "beta": 0.2, "alpha": 0.3}
    clipped = Objective(ObjectiveSettings.model_validate(fields | {"token_loss": "dac_kl", "dac": dac}))
    whole = Objective(ObjectiveSettings.model_validate(fields | {"token_loss": name}))
    values = [o(logits(0), logits(1), TARGETS, SPANS, False, COUNTS).loss for o in (clipped, whole)]
    assert not list(clipped.parameters())
    torch.testing.assert_close(*values)


def test_a_term_that_is_not_felt_is_said_once():
    watch = StepWatch(ObjectiveSettings(), patience=3)
    said = [watch.update({"sft": 2.0, "token": 1.0, "span": 0.001}) for _ in range(6)]
    assert [len(lines) for lines in said] == [0, 0, 1, 0, 0, 0] and "objective.span_weight" in said[2][0]
    quiet = StepWatch(ObjectiveSettings(), patience=3)
    for span in (0.001, 0.001, 0.1) * 3:
        assert quiet.update({"sft": 2.0, "token": 1.0, "span": span}) == []
    (line,) = quiet.update({"sft": 2.0, "token": 1.0, "span": 0.1, "retained_classes": 1.0})
    assert "objective.dac.coverage" in line
    assert quiet.update({"retained_classes": 1.0}) == []


def test_watch_speaks_once_when_the_student_no_longer_ends_its_answers():
    watch = StepWatch(ObjectiveSettings(), cut=3)
    steps = [
        1.0,
        1.0,
        {},
        0.9,
        1.0,
        1.0,
        {},
        1.0,
        1.0,
    ]  # a step without fresh answers says nothing either way
    said = [watch.update({} if step == {} else {"share_cut": step}) for step in steps]
    assert [len(lines) for lines in said] == [0] * 7 + [1, 0] and "rollout.max_completion_length" in said[7][
        0
    ]


def test_reference_scores_are_the_models_own():
    student, teacher = tiny_llama(seed=1), tiny_llama(seed=2, layers=3)
    samples = [Sample((5, 9, 11), (40, 7, 2)), Sample((8,), (300, 2)), Sample((4, 4), ())]
    got = reference_scores(student, teacher, samples, 384, batch_size=2)
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
