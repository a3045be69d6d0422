"""Slabs and blocks change neither values nor gradients: of hidden states, head and a learnable module alike."""

import pytest
import torch
from torch import nn

from redistill.losses import forward_kl
from redistill.losses.chunked import Block, by_autograd, chunked
from redistill.models import Head
from redistill.projection import projection_of, source_of
from redistill.teachers.signal import Hidden

ROWS, SEEN, HIDDEN, WIDER, VOCABULARY = 13, 9, 6, 8, 11


class Twofold(nn.Module):
    """A head that is no plain linear layer, as one with LoRA is none."""

    def __init__(self, *size: int):
        super().__init__()
        self.base, self.more = nn.Linear(*size), nn.Linear(size[0], size[1], bias=False)
        self.base.requires_grad_(False)

    def forward(self, hidden):
        return self.base(hidden) + self.more(hidden)


HEADS = {
    "linear": lambda: Head(nn.Linear(HIDDEN, VOCABULARY, bias=False), 1.0, None, VOCABULARY),
    "bias, scaled, capped, trimmed": lambda: Head(nn.Linear(HIDDEN, VOCABULARY + 3), 0.7, 2.0, VOCABULARY),
    "module": lambda: Head(Twofold(HIDDEN, VOCABULARY + 2), 1.0, 3.0, VOCABULARY),
    "frozen": lambda: Head(nn.Linear(HIDDEN, VOCABULARY).requires_grad_(False), 1.0, None, VOCABULARY),
    "frozen module": lambda: Head(Twofold(HIDDEN, VOCABULARY).requires_grad_(False), 1.0, None, VOCABULARY),
}
CUTS = {
    "one": [(0, 9, True), (9, 13, False)],
    "some": [(0, 4, True), (4, 5, True), (5, 9, True), (9, 12, False), (12, 13, False)],
    "all": [(i, i + 1, i < SEEN) for i in range(ROWS)],
}


def setup(name: str, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    head, teacher = HEADS[name](), Head(nn.Linear(WIDER, VOCABULARY), 1.0, None, VOCABULARY)
    extra = nn.Linear(VOCABULARY, 1)
    for module in (head.module, teacher.module, extra):
        module.to(dtype)
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=dtype, requires_grad=True)
    seen = torch.randn(SEEN, WIDER, generator=generator, dtype=dtype)
    return head, teacher, extra, hidden, seen


def loss_of(extra, logits, teacher):
    """The learnable module is read beside the teacher only."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_q = logits.log_softmax(-1)
    if teacher is None:
        return -log_q[:, 0].sum()
    log_p = teacher.log_softmax(-1)
    return (log_q[:, 0] * extra(logits).squeeze(-1)).sum() + (log_p.exp() * (log_p - log_q)).sum()


def run(head, teacher, extra, hidden, seen, cut, slab, exact=True):
    def block_loss(logits, teacher_logits, index):
        loss = loss_of(extra, logits, teacher_logits)
        return loss, {"sum": loss, "each": logits[:, 0], "index": torch.tensor(float(index))}

    own = list(extra.parameters())
    return chunked(
        by_autograd(block_loss, own),
        projection_of(head, hidden, trains=True, exact=exact),
        hidden,
        source_of(Hidden(seen, teacher), hidden.device, exact=exact),
        [Block(*each) for each in CUTS[cut]],
        slab,
        own,
    )


@pytest.mark.parametrize("slab", [1, 5, 100])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", HEADS)
def test_equal_to_dense(name, cut, slab):
    head, teacher, extra, hidden, seen = setup(name)
    trained = [hidden, *head.parameters(), *extra.parameters()]
    logits = head.logits(hidden)
    dense = loss_of(extra, logits[:SEEN], teacher.logits(seen)) + loss_of(extra, logits[SEEN:], None)
    total, stats = run(head, teacher, extra, hidden, seen, cut, slab)
    got, wanted = torch.autograd.grad(3.0 * total, trained), torch.autograd.grad(3.0 * dense, trained)
    torch.testing.assert_close(total, dense.detach(), check_dtype=False)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(stats["each"], logits[:, 0].detach())
    assert not stats["each"].requires_grad and stats["sum"].dim() == 0
    assert float(stats["index"]) == sum(range(len(CUTS[cut])))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["linear", "bias, scaled, capped, trimmed", "module"])
def test_under_autocast_the_head_computes_in_bf16_and_its_gradient_stays_fp32(name, exact):
    head, teacher, extra, hidden, seen = setup(name, torch.float32)
    trained = [hidden, *head.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = run(head, teacher, extra, hidden, seen, "some", 5, exact)
        logits = head.logits(hidden)
        dense = loss_of(extra, logits[:SEEN], teacher.logits(seen)) + loss_of(extra, logits[SEEN:], None)
    got, wanted = torch.autograd.grad(total, trained), torch.autograd.grad(dense, trained)
    torch.testing.assert_close(total, dense.detach().float(), rtol=2e-2, atol=0.1)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 5e-2 * theirs.norm()


def test_uncovered_positions_and_unread_parameters_get_no_gradient():
    head, _, extra, hidden, _ = setup("linear")
    own = projection_of(head, hidden, trains=True)
    loss = by_autograd(lambda logits, _, __: (logits.sum(), {}), [extra.weight])
    total, _ = chunked(loss, own, hidden, None, [Block(2, 5, False)], 9, [extra.weight])
    total.backward()
    assert hidden.grad is not None and hidden.grad[:2].abs().sum() == 0 and hidden.grad[5:].abs().sum() == 0
    assert (
        hidden.grad[2:5].abs().sum() > 0 and head.module.weight.grad is not None and extra.weight.grad is None
    )


def test_without_grad_mode_nothing_is_pulled_back():
    head, teacher, extra, hidden, seen = setup("linear")
    with torch.no_grad():
        total, _ = run(head, teacher, extra, hidden, seen, "some", 5)
    torch.testing.assert_close(total, run(head, teacher, extra, hidden, seen, "some", 5)[0].detach())
    assert not total.requires_grad


def test_a_block_may_overwrite_its_logits():
    head, teacher, _, hidden, seen = setup("linear", torch.float32)
    kl = by_autograd(lambda logits, other, _: (forward_kl(logits, other).sum(), {}))

    def greedy(logits, other, index):
        part = kl(logits, other, index)
        logits.zero_()
        return part

    for loss in (kl, greedy):
        own = projection_of(head, hidden, trains=True)
        total, _ = chunked(
            loss, own, hidden, source_of(Hidden(seen, teacher), hidden.device), [Block(0, 9, True)], 5
        )
        torch.testing.assert_close(
            torch.autograd.grad(total, hidden)[0],
            torch.autograd.grad(forward_kl(head.logits(hidden[:9]), teacher.logits(seen)).sum(), hidden)[0],
        )
