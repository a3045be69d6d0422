"""Slicing changes neither values nor gradients, of hidden states, head and a learnable module alike."""

import pytest
import torch
from torch import nn

from redistill.losses.chunked import chunked


def setup(seed=0, rows=13, hidden=6, vocabulary=11):
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(hidden, vocabulary).double()
    extra = nn.Linear(vocabulary, 1).double()
    for parameter in [*head.parameters(), *extra.parameters()]:
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    states = torch.randn(rows, hidden, generator=generator, dtype=torch.float64, requires_grad=True)
    return states, head, extra


def loss_of(head, extra, part):
    logits = head(part)
    return (logits.log_softmax(-1)[:, 0] * extra(logits).squeeze(-1)).sum()


@pytest.mark.parametrize("edges", [[0, 13], [0, 4, 8, 13], list(range(14))])
def test_equal_to_dense(edges):
    states, head, extra = setup()
    parameters = [*head.parameters(), *extra.parameters()]
    dense = 3.0 * loss_of(head, extra, states)
    wanted = torch.autograd.grad(dense, [states, *parameters])

    def slice_loss(part, index):
        loss = loss_of(head, extra, part)
        return loss, {"sum": loss, "each": head(part)[:, 0], "index": torch.tensor(float(index))}

    slices = list(zip(edges, edges[1:], strict=False))
    total, stats = chunked(slice_loss, states, slices, parameters)
    got = torch.autograd.grad(3.0 * total, [states, *parameters])
    torch.testing.assert_close(total, dense.detach().float() / 3, check_dtype=False)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(stats["each"], head(states)[:, 0].detach())
    assert not stats["each"].requires_grad and stats["sum"].dim() == 0
    assert float(stats["index"]) == sum(range(len(slices)))


def test_uncovered_positions_and_unread_parameters_get_no_gradient():
    states, head, extra = setup()
    total, _ = chunked(
        lambda part, _: (head(part).sum(), {}), states, [(2, 5)], [*head.parameters(), extra.weight]
    )
    total.backward()
    assert states.grad is not None and states.grad[:2].abs().sum() == 0 and states.grad[5:].abs().sum() == 0
    assert states.grad[2:5].abs().sum() > 0 and head.weight.grad is not None and extra.weight.grad is None


def test_without_grad_mode_only_the_forward_runs():
    states, head, extra = setup()
    with torch.no_grad():
        total, _ = chunked(
            lambda part, _: (loss_of(head, extra, part), {}), states, [(0, 13)], list(head.parameters())
        )
    assert not total.requires_grad
