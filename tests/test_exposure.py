"""Excess accumulated error against the sums by hand, and on models."""

import pytest
import torch
from tiny import tiny_llama

from redistill.evaluation.exposure import answer_divergences, excess_error
from redistill.sample import Sample


def test_by_hand():
    curve = excess_error([[1.0, 2.0, 3.0], [3.0]], [[1.0, 1.0], [1.0, 2.0]])
    # Student-written: means 2, 2 (one answer is left), 3. Teacher-written: 1, 1.5, and no third position.
    assert curve.accumulated == (2.0, 4.0)
    assert curve.expected == (1.0, 2.5)
    assert curve.percent == (100.0, pytest.approx(60.0))
    assert (curve.student_answers, curve.teacher_answers) == ((2, 1), (2, 2))
    assert (curve.at(0), curve.at(1), curve.at(2), curve.at(3)) == (None, 100.0, curve.percent[1], None)
    assert excess_error([[1.0, 2.0, 3.0], [3.0]], [[1.0, 1.0], [1.0, 2.0]], at_least=2).percent == (100.0,)


def test_an_answer_that_ends_says_nothing_about_what_follows():
    # One error a token on both: no exposure bias, however long either writes.
    long, short = [[1.0] * 9 for _ in range(5)], [[1.0] * size for size in (9, 1, 2, 1, 3)]
    assert excess_error(long, short).percent == (0.0,) * 9
    assert excess_error(short, long).percent == (0.0,) * 9


def test_edges():
    assert excess_error([], [[1.0]]).percent == ()
    assert excess_error([[]], [[]]).at(1) is None
    assert excess_error([[0.0, 0.0]], [[0.0, 0.0]]).percent == (None, None)  # the teacher against itself
    assert excess_error([[0.5]], [[1.0]]).percent == (-50.0,)
    with pytest.raises(ValueError, match="at_least"):
        excess_error([], [], at_least=0)


@torch.no_grad()
def test_divergences_are_forward_kl_position_by_position():
    student, teacher = tiny_llama(seed=1), tiny_llama(seed=2)
    answered = [Sample((5, 6, 7), (8, 9)), Sample((5,), (10, 11, 12, 2)), Sample((5,), ())]
    found = answer_divergences(student, teacher, answered, vocabulary=384, batch_size=2)
    assert [len(each) for each in found] == [2, 4, 0]
    for sample, kl in zip(answered, found, strict=True):
        for at in range(len(sample.response)):
            ids = torch.tensor([sample.prompt + sample.response[:at]])
            q, p = (model(ids).logits[0, -1].double().log_softmax(-1) for model in (student, teacher))
            assert kl[at] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
    itself = answer_divergences(teacher, teacher, answered[:2], vocabulary=384, batch_size=2)
    assert itself == [[0.0] * 2, [0.0] * 4]
