"""The network that chooses DAC-KL's two quantile levels for each position."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from redistill.losses.divergences import Distributions, distributions
from redistill.losses.quantile import top_classes


class ClipNetwork(nn.Module):
    """Quantile levels `lower < upper` from how teacher and student see a position (arXiv 2407.10068).

    Features, all detached: the teacher's `top_k` largest log-probabilities, the student's at the same
    classes, the log of the mass each leaves to the other classes, and both entropies. A perceptron with one
    hidden layer gives two raw numbers x, made amounts a, b = (x + sqrt(x^2 + c^2)) / 2 > 0 ("squareplus",
    Barron 2021); lower = a / (1 + a + b), upper = (1 + a) / (1 + a + b), so upper - lower = 1 / (1 + a + b) > 0.
    It starts with a = b = 0.004 in every position: lower 0.004, upper 0.996.
    Why not sigmoids: at 0.004 a sigmoid's slope is 0.004, and the levels stay where they are for hundreds of
    steps. Squareplus has a slope of 0.14 there and nearly 1 soon after; towards "open" it fades only like
    1 / x^2, so that the levels never freeze. A position can still tell the network nothing: one that is cut down to
    the teacher's most probable class, which is always kept, because that has all of the mass above `lower`.
    """

    START = 0.004
    BEND = 0.02

    def __init__(
        self, hidden: int = 64, top_k: int = 32, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if hidden < 1 or top_k < 1:
            raise ValueError(f"hidden and top_k must be at least 1, not {hidden} and {top_k}.")
        self.top_k = top_k
        self.inner = nn.Linear(2 * top_k + 4, hidden)
        self.outer = nn.Linear(hidden, 2)
        bound = self.inner.in_features**-0.5
        nn.init.uniform_(self.inner.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.inner.bias)
        nn.init.zeros_(self.outer.weight)
        nn.init.constant_(self.outer.bias, self.START - self.BEND**2 / (4 * self.START))

    def forward(
        self, student_logits: Float[Tensor, "N V"], teacher_logits: Float[Tensor, "N V"]
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """`lower, upper`, each [N] fp64, 0 < lower < upper < 1. No gradient goes to the logits.

        fp64, as the mass above `upper` is what counts: 1 - upper would have five digits left in fp32.
        """
        return self.levels(distributions(student_logits, teacher_logits))

    def levels(
        self, both: Distributions, tail: bool = False
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """`forward`, from what else is made of the logits too. tail: the last class is several, not one to see."""
        features = self._features(both, tail)
        raw = self.outer(nn.functional.silu(self.inner(features.to(self.inner.weight.dtype)))).double()
        below, above = (0.5 * (raw + torch.sqrt(raw.square() + self.BEND**2))).unbind(-1)
        whole = 1 + below + above
        return below / whole, (1 + below) / whole

    @torch.no_grad()
    def _features(self, both: Distributions, tail: bool) -> Tensor:
        classes = both.p.shape[1] - tail
        k = min(self.top_k, classes)
        top_p, ids = top_classes(both.log_p[:, :classes], k)
        top_q = both.log_q.gather(1, ids)
        entropies, tails, tops = [], [], []
        for logs, probabilities, top in ((both.log_p, both.p, top_p), (both.log_q, both.q, top_q)):
            entropies.append(-torch.linalg.vecdot(probabilities, logs)[:, None])
            tails.append((1 - top.exp().sum(-1, keepdim=True)).clamp(min=1e-6).log())
            tops.append(nn.functional.pad(top.clamp(min=-20.0), (0, self.top_k - k), value=-20.0))
        return torch.cat((*tops, *tails, *entropies), dim=-1) / 10
