"""Memory that does not suffice: the step is taken again in halves, and its curve does not show it."""

import logging

import pytest
import torch
from test_trainer import assert_same_curve, curve, recipe, trainer
from torch import Tensor

from redistill.out_of_memory import Halving, OutOfMemory, is_out_of_memory

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"


class Bound(torch.autograd.Function):
    """The identity, behind which the gradient finds no memory when it is of more than `most` rows."""

    @staticmethod
    def forward(ctx, hidden: Tensor, most: int) -> Tensor:
        ctx.most = most
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        if len(gradient) > ctx.most:
            raise torch.OutOfMemoryError(SAID)
        return gradient, None


def bounded(run, *, writing: int = 99, forward: int = 99, backward: int = 99):
    """A student with room for so many rows in its second layer; it counts its prefills."""
    calls = {"read": 0}

    def before(_, args):
        rows = len(args[0])
        if not torch.is_grad_enabled():
            calls["read"] += args[0].shape[1] > 1
        if rows > (forward if torch.is_grad_enabled() else writing):
            raise torch.OutOfMemoryError(SAID)
        return (Bound.apply(args[0], backward), *args[1:]) if torch.is_grad_enabled() else None

    run.pair.student.model.layers[1].register_forward_pre_hook(before)
    return calls


def unpacked(run):
    """One sequence a row, so that rows are what is bounded."""
    object.__setattr__(run.pair, "packed", False)
    return run


def weights(run) -> Tensor:
    trained = [*run.pair.student.parameters(), *run.objective.parameters()]
    return torch.cat([parameter.detach().flatten() for parameter in trained])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("enough")
    run = unpacked(trainer(recipe(folder)))
    calls = bounded(run)
    run.train()
    return folder, run, calls["read"]


def drops_gradients(monkeypatch) -> list[int]:
    """How many parameters had a gradient each time that all were dropped."""
    from redistill.accumulation import Accumulation

    found, drop = [], Accumulation._start_anew

    def watched(self):
        found.append(sum(parameter.grad is not None for parameter in self._trained))
        drop(self)

    monkeypatch.setattr(Accumulation, "_start_anew", watched)
    return found


@pytest.mark.parametrize(
    ("where", "batch", "accumulate"), [("forward", 8, 1), ("backward", 8, 1), ("backward", 4, 2)]
)
def test_a_step_in_halves_is_the_same_step(whole, tmp_path, where, batch, accumulate, monkeypatch, caplog):
    folder, enough, read = whole
    run = unpacked(trainer(recipe(tmp_path, batch=batch, accumulate=accumulate)))
    calls, dropped = bounded(run, **{where: 3}), drops_gradients(monkeypatch)
    run.train()
    assert_same_curve(curve(tmp_path), curve(folder))
    torch.testing.assert_close(weights(run), weights(enough), rtol=1e-3, atol=2e-5)
    assert run.reading.rows is not None and run.reading.rows <= 3
    assert max(dropped) > 0, "an earlier piece, or half of a backward, had left gradients behind"
    assert calls["read"] == read, "nothing was written or scored again"
    said = [record.message for record in caplog.records if "out of memory" in record.message]
    assert 1 <= len(said) == len(dropped) <= 3, "once for each halving, in six steps"
    assert "in the loss" in said[0] and "per_device_train_batch_size" in said[0]


def test_answers_written_in_halves_are_the_same(whole, tmp_path, caplog):
    run = unpacked(trainer(recipe(tmp_path)))
    bounded(run, writing=2)
    run.train()
    assert_same_curve(curve(tmp_path), curve(whole[0]))
    answers = [[kept["response"] for kept in each.rollout_state.buffer.state()] for each in (run, whole[1])]
    assert answers[0] == answers[1] != []
    assert run.writing.rows is not None and run.writing.rows <= 2 and run.reading.rows is None
    assert sum("rollout.batch_size" in record.message for record in caplog.records) <= 3


def test_one_row_too_much_is_a_sentence_and_other_errors_pass(tmp_path):
    run = unpacked(trainer(recipe(tmp_path)))
    bounded(run, forward=0)
    with pytest.raises(
        OutOfMemory, match=r"in the loss, with one row at once: lower .*max_completion_length"
    ):
        run.train()

    def broken(_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        Halving("x", "y").run(4, broken)


def test_what_counts_as_out_of_memory():
    cpu = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried .."
    assert all(map(is_out_of_memory, [RuntimeError(cpu), torch.OutOfMemoryError(SAID), MemoryError()]))
    assert not any(map(is_out_of_memory, [RuntimeError("nan"), ValueError(SAID), KeyboardInterrupt()]))


@pytest.mark.parametrize(("given", "room", "tried"), [(8, 3, [8, 4, 2]), (5, 1, [5, 3, 2, 1]), (1, 1, [1])])
def test_halving_is_remembered_and_undone_before_each_new_attempt(given, room, tried, caplog):
    halving, attempts, undone = Halving("work", "a.setting"), [], []

    def attempt(rows):
        attempts.append(rows)
        if rows > room:
            raise torch.OutOfMemoryError(SAID)
        return rows

    with caplog.at_level(logging.WARNING):
        assert halving.run(given, attempt, lambda: undone.append(len(attempts))) == tried[-1]
        assert attempts == tried and undone == list(range(1, len(tried)))
        assert halving.run(given, attempt) == tried[-1] and attempts == [*tried, tried[-1]]
    assert len(caplog.records) == len(tried) - 1


def test_one_of_several_processes_does_not_halve_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    def attempt(_):
        raise torch.OutOfMemoryError(SAID)

    with pytest.raises(OutOfMemory, match=r"in one of 2 processes: lower rollout\.batch_size"):
        Halving("writing answers", "rollout.batch_size").run(8, attempt)
