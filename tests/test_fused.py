"""torch.compile changes nothing but the order of additions, and compiles a bounded number of times."""

import shutil

import jaxtyping
import pytest
import torch
from torch._dynamo.utils import counters

from redistill.batch import Counts
from redistill.config import ObjectiveSettings
from redistill.objective import Objective

pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler on a CPU"
)
CASES = [
    {"dac": {"coverage": 0.5}, "temperature": 1.5},
    {"dac": {"rest": "renormalize", "divergence": "jensen_shannon"}},
    {"token_loss": "skewed_reverse_kl"},
]


def part_of(objective: Objective, n: int):
    generator = torch.Generator().manual_seed(n)
    student, teacher = (3 * torch.randn(n, 1009, generator=generator) for _ in range(2))
    student[:, ::7] = -torch.inf  # the mask of barred classes is a branch where nothing is compiled
    targets, spans = torch.ones(n, dtype=torch.long), torch.arange(n) // 2
    return objective(student, teacher, targets, spans, True, Counts(7.0, 5.0, 2.0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_equals_eager_and_rows_in_other_numbers_need_no_new_code(case, monkeypatch):
    # Dynamo cannot look through the shape checks that conftest.py switches on.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    eager, compiled = (
        Objective(
            ObjectiveSettings.model_validate(case | {"compile": each}), torch.Generator().manual_seed(0)
        )
        for each in (False, True)
    )
    graphs = []
    for n in (5, 1, 4, 9, 2, 1, 33):
        ours, plain = part_of(compiled, n), part_of(eager, n)
        torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-5, atol=0)
        assert (ours.by_logits - plain.by_logits).norm() < 1e-5 * plain.by_logits.norm()
        for one, other in zip(ours.by_parameters, plain.by_parameters, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1] == graphs[-1]
