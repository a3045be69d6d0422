import pytest
import torch

from redistill import losses


def pair(shape: tuple[int, int], scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    student, teacher = (scale * torch.randn(shape, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


def seeded_network(**sizes) -> losses.ClipNetwork:
    return losses.ClipNetwork(**sizes, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(4, 64), (1, 7), (0, 9)])
def test_clip_network_starts_open_and_leaves_the_logits_alone(shape):
    student, teacher = pair(shape)
    network = seeded_network()
    lower, upper = network(student.bfloat16(), teacher)
    assert lower.shape == upper.shape == shape[:1] and lower.dtype == upper.dtype == torch.float64
    assert (lower >= 0).all() and (lower <= 0.005).all() and (upper >= 0.995).all() and (upper <= 1).all()
    losses.dac_kl(student.detach(), teacher, lower, upper).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    lower, upper = network(student, teacher)
    (lower + upper).sum().backward()
    assert student.grad is None


def test_clip_network_keeps_its_levels_in_order_whatever_its_weights():
    student, teacher = pair((200, 23), scale=10.0)
    teacher[0, 3:] = -torch.inf
    network = seeded_network(hidden=8, top_k=40)
    for scale in (0.1, 10.0, 1000.0):
        torch.nn.init.normal_(network.outer.weight, std=scale, generator=torch.Generator().manual_seed(1))
        lower, upper = network(student, teacher)
        assert (lower >= 0).all() and (lower < upper).all() and (upper <= 1).all()


def test_clip_network_of_one_seed_is_one_network():
    first = seeded_network()
    torch.rand(3)
    second = seeded_network()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def train_clip(coverage: float, steps: int = 40) -> torch.Tensor:
    """The kept teacher mass after a few steps in which only the network learns."""
    student, teacher = pair((16, 101))
    student = student.detach()
    network = seeded_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(steps):
        terms = losses.dac_terms(student, teacher, *network(student, teacher))
        loss = (terms.divergence - coverage * terms.retained_mass.log()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    lower, upper = network(student, teacher)
    return (upper - lower).detach()


def test_clip_network_learns_to_clip_and_coverage_holds_it_back():
    alone, held = train_clip(coverage=0.0).mean(), train_clip(coverage=30.0).mean()
    assert alone < 0.6
    assert held > 0.95
